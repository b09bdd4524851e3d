"""The rule that turns a frozen Mixture-of-Masks layer into shared and routed experts of equal width.

H = hidden, F = FFN channels, E = masks, W = channels of an expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import override

import torch

from megatron_l0moe.checkpoints.rules import Piece, ReadRows, Rule, Shape
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.experts.mask_units import ExpertWidths, sort_units


@dataclass(frozen=True, kw_only=True)
class MaskedExperts(Rule):
    """One FFN and its masks against E routed experts and, where some layer needs it, a shared one.

    An expert narrower than W is filled with zero channels, which give silu(0) * 0 = 0. Inactive units are dropped, and
    a unit of several masks is stored in each of their experts, so the way back is closed.
    """

    mlp: str
    """Megatron's name of the MLP."""
    hf: str
    """Name of the MoE block."""
    masks: int
    widths: ExpertWidths
    ffn: int
    hidden: int

    @override
    def hf_shapes(self) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {}
        for expert, width in self._experts():
            shapes |= {
                f"{expert}.gate_proj.weight": (width, self.hidden),
                f"{expert}.up_proj.weight": (width, self.hidden),
                f"{expert}.down_proj.weight": (self.hidden, width),
            }
        return shapes

    @override
    def megatron_shapes(self) -> dict[str, Shape]:
        return {
            f"{self.mlp}.linear_fc1.weight": (2 * self.ffn, self.hidden),
            f"{self.mlp}.linear_fc2.weight": (self.hidden, self.ffn),
            f"{self.mlp}.masks.hard_mask": (self.masks, self.ffn),
        }

    @override
    def to_megatron(self, read: ReadRows) -> Iterator[Piece]:
        raise L0MoEError(
            f"{self.hf} was a Mixture-of-Masks, whose dropped units and masks an export does not hold; go on from the "
            "Megatron checkpoint."
        )

    @override
    def to_hf(self, read: ReadRows) -> Iterator[Piece]:
        units = sort_units(read(f"{self.mlp}.masks.hard_mask"))
        gate, up = read(f"{self.mlp}.linear_fc1.weight").chunk(2)
        down = read(f"{self.mlp}.linear_fc2.weight")
        for (expert, width), kept in zip(self._experts(), (*units.routed, units.shared), strict=False):
            for name, tensor in (("gate", gate), ("up", up)):
                filled = tensor.new_zeros(width, self.hidden)
                filled[: len(kept)] = tensor[kept]
                yield _whole(f"{expert}.{name}_proj.weight", filled)
            filled = down.new_zeros(self.hidden, width)
            filled[:, : len(kept)] = down[:, kept]
            yield _whole(f"{expert}.down_proj.weight", filled)

    def _experts(self) -> list[tuple[str, int]]:
        """Return (name, channels) of every expert, the shared one last."""
        routed = [(f"{self.hf}.experts.{e}", self.widths.expert) for e in range(self.masks)]
        if not self.widths.num_shared:
            return routed
        return [*routed, (f"{self.hf}.shared_experts", self.widths.num_shared * self.widths.expert)]


def _whole(name: str, tensor: torch.Tensor) -> Piece:
    return Piece(name=name, tensor=tensor, begin=0, rows=tensor.shape[0])

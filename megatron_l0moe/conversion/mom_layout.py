"""A frozen Mixture-of-Masks as an Ernie4.5-MoE with shared experts: units, tensors and config.json.

Of the layouts that stock engines know, it has both a shared FFN that is added as it is and a softmax after top-k.

A unit that all masks keep has the factor 1 whatever the router says: it belongs to a shared expert. One that no mask
keeps does nothing. The others are routed: mask e's become the channels of expert e, and a unit of several masks is
copied into each of their experts, since its factor is the sum of the weights of those that are chosen. Shared and
routed experts are of equal width.

H = hidden, F = FFN channels of a dense layer, E = masks, k = masks of a token, W = channels of an expert.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, override

import torch

from megatron_l0moe.checkpoints.families import MoEShape, ernie_layers
from megatron_l0moe.checkpoints.rules import Piece, ReadRows, Rename, Rule, Shape, Zeros
from megatron_l0moe.checkpoints.torch_dist import CheckpointReader
from megatron_l0moe.conversion.moe_layouts import LAYOUTS
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.sizes.architecture import Architecture


@dataclass(frozen=True)
class MaskUnits:
    """The units of one layer; ascending int64."""

    shared: torch.Tensor
    """Kept by all masks."""
    routed: tuple[torch.Tensor, ...]
    """The units of each mask that it keeps and another does not."""
    inactive: torch.Tensor
    """The units that no mask keeps."""


@dataclass(frozen=True, kw_only=True)
class ExpertWidths:
    """Widths that hold every layer's experts when narrower ones are filled with zero channels."""

    expert: int
    """Channels of a routed expert, and of one shared expert."""
    num_shared: int
    """Shared experts side by side, as one FFN of `num_shared * expert` channels; 0 for none."""


def sort_units(hard_mask: torch.Tensor) -> MaskUnits:
    """Sort the units of a frozen layer.

    Args:
        hard_mask: masks of 0 and 1, [E, F].
    """
    if not bool(((hard_mask == 0) | (hard_mask == 1)).all()):
        raise L0MoEError(
            "The frozen masks hold other values than 0 and 1; the checkpoint is damaged, use an earlier one."
        )
    kept = hard_mask.bool()
    in_all, in_any = kept.all(dim=0), kept.any(dim=0)
    return MaskUnits(
        shared=in_all.nonzero().flatten(),
        routed=tuple((mask & ~in_all).nonzero().flatten() for mask in kept),
        inactive=(~in_any).nonzero().flatten(),
    )


def common_widths(layers: Sequence[MaskUnits], *, top_k: int, multiple: int = 1) -> ExpertWidths:
    """Return the widths of all layers' experts with the fewest channels for a token, then the fewest shared experts.

    A layout of stock engines has one width for all routed experts of all layers, and a shared FFN of a multiple of it.

    Args:
        layers: units of each layer.
        top_k: k.
        multiple: what the width must be a multiple of.
    """
    routed = max(len(units) for layer in layers for units in layer.routed)
    shared = max(len(layer.shared) for layer in layers)
    if routed == shared == 0:
        raise L0MoEError(
            "No mask keeps a unit in any layer, so there is no expert to write; raise --l0-masks-target."
        )
    least = _rounded_up(max(routed, 1), multiple)
    if shared == 0:
        return ExpertWidths(expert=least, num_shared=0)
    choices = []
    for num_shared in range(1, -(-shared // least) + 1):
        width = max(least, _rounded_up(-(-shared // num_shared), multiple))
        choices.append(((top_k + num_shared) * width, num_shared, width))
    _, num_shared, width = min(choices)
    return ExpertWidths(expert=width, num_shared=num_shared)


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


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
    return Piece(name=name, tensor=tensor, begin=0, total_rows=tensor.shape[0])


@dataclass(frozen=True, kw_only=True)
class MaskShape:
    """What a frozen Mixture-of-Masks has beside its dense base."""

    dense_layers: int
    masks: int
    top_k: int
    widths: ExpertWidths
    counts: dict[int, dict[str, Any]]
    """The numbers of units by layer that are `shared` and `inactive`, and `routed` ones by mask."""

    @classmethod
    def from_checkpoint(
        cls, reader: CheckpointReader, architecture: Architecture, *, multiple: int
    ) -> "MaskShape":
        """Read the masks of a checkpoint.

        Raises:
            L0MoEError: another stage, masks that are not frozen or empty, a base with biases on q, k and v.
        """
        settings = reader.settings
        if settings.get("stage") != "mom":
            raise L0MoEError(
                f"{reader.path} is of the stage {settings.get('stage')!r} and has no masks to choose from; give a "
                "checkpoint of --l0-stage mom."
            )
        if architecture.qkv_bias:
            raise L0MoEError(
                f"{reader.path} has biases on q, k and v, which Ernie4.5-MoE cannot express, and no other stock layout "
                "adds a shared expert as it is; start from a base without them."
            )
        layers = {
            layer: _units(reader, layer) for layer in range(settings["dense_layers"], architecture.num_layers)
        }
        top_k = settings["l0_masks_top_k"]
        return cls(
            dense_layers=settings["dense_layers"],
            masks=settings["l0_masks"],
            top_k=top_k,
            widths=common_widths(list(layers.values()), top_k=top_k, multiple=multiple),
            counts={
                layer: {
                    "shared": len(units.shared),
                    "routed": [len(part) for part in units.routed],
                    "inactive": len(units.inactive),
                }
                for layer, units in layers.items()
            },
        )


def _units(reader: CheckpointReader, layer: int) -> MaskUnits:
    prefix = f"decoder.layers.{layer}.mlp.masks"
    if not bool(reader.read(f"{prefix}.frozen").item()):
        raise L0MoEError(
            f"The masks of {reader.path} are not frozen, so units still have values between 0 and 1; give a checkpoint "
            "of the last steps (--l0-freeze-fraction)."
        )
    return sort_units(reader.read(f"{prefix}.hard_mask"))


def mom_rules(architecture: Architecture, shape: MaskShape) -> list[Rule]:
    """Return the table: Ernie's attention and norms, dense layers first, then masks as experts."""
    a = architecture
    rules = ernie_layers(a, shape.dense_layers)
    for layer in range(shape.dense_layers, a.num_layers):
        hf, megatron = f"model.layers.{layer}", f"decoder.layers.{layer}.mlp"
        rules += [
            Rename(
                megatron=f"{megatron}.linear_fc1.layer_norm_weight",
                hf=f"{hf}.post_attention_layernorm.weight",
                shape=(a.hidden_size,),
            ),
            Rename(
                megatron=f"{megatron}.mask_router.weight",
                hf=f"{hf}.mlp.gate.weight",
                shape=(shape.masks, a.hidden_size),
            ),
            Zeros(hf=f"{hf}.mlp.moe_statics.e_score_correction_bias", shape=(1, shape.masks)),
            MaskedExperts(
                mlp=megatron,
                hf=f"{hf}.mlp",
                masks=shape.masks,
                widths=shape.widths,
                ffn=a.ffn_hidden_size,
                hidden=a.hidden_size,
            ),
        ]
    return rules


def mom_config(architecture: Architecture, shape: MaskShape, dtype: str) -> dict[str, Any]:
    """Return config.json's dictionary."""
    moe = MoEShape(
        dense_layers=shape.dense_layers,
        num_experts=shape.masks,
        expert_ffn=shape.widths.expert,
        top_k=shape.top_k,
    )
    config = LAYOUTS["ernie4_5_moe"].hf_config(architecture, moe, dtype, ["transformers"])
    return {**config, "moe_num_shared_experts": shape.widths.num_shared}

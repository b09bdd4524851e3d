"""What a calibration pass keeps of one MLP: sums over the tokens of a domain, never the tokens themselves.

T = tokens of a micro-batch, H = hidden, F = FFN channels, f = F / p, the channels of one tensor-parallel rank.
All sums add up over data-parallel ranks, and their rows over tensor-parallel ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_l0moe.errors import L0MoEError

Pairs = Literal["none", "activations", "patterns"]
"""Products of pairs of units: none, of their activations, or of whether both are active on a token."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The sums of one layer over all tokens of the pass, on one process."""

    tokens: int
    input_mean: Tensor
    """fp32 [H], mean of the MLP's normalised input, which is the router's."""
    activation_squares: Tensor
    """fp64 [F], sum over the tokens of a_j^2, a = silu(gate x) * (up x), the input of fc2."""
    pairs: Tensor | None = None
    """fp32 [F, F]: sum of a a^T, or numbers of tokens on which both units are active."""
    pattern_inputs: Tensor | None = None
    """fp32 [F, H]: sum of the inputs of the tokens on which a unit is active."""


class CalibrationSums:
    """Collects the sums of one layer on one rank, in fp64 (vectors) and fp32 (matrices).

    Args:
        hidden: H.
        local: f.
        width: F.
        pairs: which matrix [f, F] is kept; `patterns` also keeps [f, H].
        active: units that count as active on a token, for `patterns`.
        device: where the sums lie.
    """

    def __init__(
        self, *, hidden: int, local: int, width: int, pairs: Pairs, active: int, device: torch.device
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._kind, self._active = pairs, active
        self.tokens = zeros(1, dtype=torch.float64)
        self.input_sum = zeros(hidden, dtype=torch.float64)
        self.activation_squares = zeros(local, dtype=torch.float64)
        self.pairs = zeros(local, width) if pairs != "none" else None
        self.pattern_inputs = zeros(local, hidden) if pairs == "patterns" else None

    def add(
        self, inputs: Tensor, activations: Tensor, full: Tensor | None, sizes: Tensor | None, first: int = 0
    ) -> None:
        """Add a micro-batch.

        Args:
            inputs: [T, H], the MLP's normalised input.
            activations: [T, f], the input of fc2.
            full: [T, F], the same of all tensor-parallel ranks; needed for pairs.
            sizes: [F], length of each unit's column of fc2; needed for patterns.
            first: the first of this rank's channels.
        """
        self.tokens += inputs.shape[0]
        self.input_sum += inputs.sum(0, dtype=torch.float64)
        self.activation_squares += activations.double().square().sum(0)
        if self._kind == "none":
            return
        assert full is not None
        assert self.pairs is not None
        if self._kind == "activations":
            self.pairs.addmm_(activations.float().T, full.float())
            return
        assert sizes is not None
        assert self.pattern_inputs is not None
        active = active_units(full, sizes, self._active)
        own = active[:, first : first + activations.shape[1]]
        self.pairs.addmm_(own.T, active)
        self.pattern_inputs.addmm_(own.T, inputs.float())

    def reduce(self, add_up: Callable[[Tensor], None]) -> None:
        """Add the sums of the data-parallel ranks; `add_up` does so in place."""
        for tensor in (
            self.tokens,
            self.input_sum,
            self.activation_squares,
            self.pairs,
            self.pattern_inputs,
        ):
            if tensor is not None:
                add_up(tensor)

    def gather(self, rows: Callable[[Tensor], Tensor], layer: int) -> Calibration:
        """Return the layer's calibration; `rows` puts the rows of the tensor-parallel ranks together.

        Raises:
            L0MoEError: the dense model gave NaN or infinite numbers, or no unit of the layer is ever active.
        """
        squares = rows(self.activation_squares)
        if not bool(self.input_sum.isfinite().all() and squares.isfinite().all()):
            raise L0MoEError(
                f"The dense model's activations of layer {layer} are not finite on the calibration text; check the "
                "model with `l0moe convert` and the text with `l0moe inspect`."
            )
        if not bool((squares > 0).any()):
            raise L0MoEError(
                f"All units of layer {layer} are 0 on the whole calibration text, so nothing can be chosen among them; "
                "raise expert_training.calibration.tokens, or keep the layer dense (model.dense_layers)."
            )
        return Calibration(
            tokens=int(self.tokens.item()),
            input_mean=(self.input_sum / self.tokens).float(),
            activation_squares=squares,
            pairs=None if self.pairs is None else rows(self.pairs),
            pattern_inputs=None if self.pattern_inputs is None else rows(self.pattern_inputs),
        )


def active_units(activations: Tensor, sizes: Tensor, active: int) -> Tensor:
    """Return the activation pattern fp32 [T, F]: 1 for the `active` units of a token that add most to its output."""
    most = (activations.float().abs() * sizes).topk(active, dim=1).indices
    return torch.zeros_like(activations, dtype=torch.float32).scatter_(1, most, 1.0)

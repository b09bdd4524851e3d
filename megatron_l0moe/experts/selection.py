"""Which FFN units an expert keeps, and how much the experts' choices overlap.

F = FFN channels of a dense layer, E = units that an expert keeps, K = experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_l0moe.errors import L0MoEError


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """Hard concrete distribution of eq. 1, as the expert run used it."""

    temperature: float = 0.83
    """b of eq. 1."""
    stretch_low: float = -0.1
    """gamma of eq. 1, below 0."""
    stretch_high: float = 1.1
    """zeta of eq. 1, above 1."""


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """How alike the K experts of one layer are."""

    iou_matrix: list[list[float]]
    """[K][K] intersection over union of the chosen units."""
    mean_iou: float
    """Mean over the pairs of different experts."""
    coverage: float
    """Fraction of the F units that at least one expert keeps."""


def select_units(log_alpha: torch.Tensor, width: int) -> torch.Tensor:
    """Return the `width` units with the largest log_alpha [F], ties to the lower index; ascending int64 [E]."""
    if log_alpha.isnan().any():
        raise L0MoEError(
            "log_alpha holds NaN; the expert run has diverged, go back to an earlier checkpoint."
        )
    if not 1 <= width <= log_alpha.numel():
        raise L0MoEError(
            f"The expert width ({width}) must be between 1 and the layer's {log_alpha.numel()} FFN units."
        )
    order = torch.sort(log_alpha.float(), descending=True, stable=True).indices
    return order[:width].sort().values


def units_of_mask(hard_mask: torch.Tensor, width: int) -> torch.Tensor:
    """Return the units of a frozen 0/1 mask [F] ascending int64 [E]; exactly `width` must be kept."""
    units = hard_mask.nonzero().flatten()
    if units.numel() != width:
        raise L0MoEError(
            f"The frozen mask keeps {units.numel()} units, but the expert width is {width}; use the width "
            "that the expert run was trained for."
        )
    return units


def deterministic_gate(log_alpha: torch.Tensor, gate: GateSettings) -> torch.Tensor:
    """Return z of eq. 1 without noise: clamp(sigmoid(log_alpha / b) (zeta - gamma) + gamma, 0, 1); fp32 [F]."""
    s = torch.sigmoid(log_alpha.float() / gate.temperature)
    stretched = s * (gate.stretch_high - gate.stretch_low) + gate.stretch_low
    return stretched.clamp(0.0, 1.0)


def overlap(units: Sequence[torch.Tensor], num_units: int) -> Overlap:
    """Compare the units of K experts of one layer that has `num_units` (F) in all."""
    kept = torch.zeros(len(units), num_units, dtype=torch.float64)
    for k, chosen in enumerate(units):
        kept[k, chosen] = 1.0
    shared = kept @ kept.T  # [K, K] sizes of the intersections
    sizes = kept.sum(1)
    iou = shared / (sizes[:, None] + sizes[None, :] - shared)
    pairs = iou[~torch.eye(len(units), dtype=torch.bool)]
    return Overlap(
        iou_matrix=iou.tolist(),
        mean_iou=float(pairs.mean()) if pairs.numel() else 1.0,
        coverage=float((kept.sum(0) > 0).double().mean()),
    )


def chance_iou(width: int, num_units: int) -> float:
    """Return the IoU of two random choices of E units out of F: p / (2 - p) with p = E / F."""
    share = width / num_units
    return share / (2.0 - share)

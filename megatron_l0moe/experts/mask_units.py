"""Mixture-of-Masks after the freeze: the units of a layer as shared, routed and inactive ones, and their widths.

A unit that all masks keep has the factor 1 whatever the router says: it belongs to a shared expert. One that no mask
keeps does nothing. The others are routed: mask e's become the channels of expert e, and a unit of several masks is
copied into each of their experts, since its factor is the sum of the weights of those that are chosen.

F = FFN channels of a dense layer, E = masks, k = masks of a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_l0moe.errors import L0MoEError


@dataclass(frozen=True)
class MaskUnits:
    """The units of one layer; ascending int64."""

    shared: torch.Tensor
    """Kept by all masks."""
    routed: tuple[torch.Tensor, ...]
    """For each mask, what it keeps and another does not."""
    inactive: torch.Tensor
    """Kept by none."""


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

    Raises:
        L0MoEError: another value than 0 and 1.
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

    Raises:
        L0MoEError: no mask of any layer keeps a unit.
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

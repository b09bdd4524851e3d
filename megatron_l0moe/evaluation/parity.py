"""Megatron's logits against those of the exported model, in float32, on real held-out text.

Shapes: N = positions, V = vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.evaluation.models import load_model

LOGIT_ATOL = 1e-4
"""Largest difference of two float32 programs that sum in different orders, over 30 layers; measured: about 1e-5."""
NEAR_TIE_MARGIN = 1e-4
"""Relative gap of router probabilities that float32 rounding of the layers before can close."""

LARGEST_NEAR_TIE_SHARE = 0.25
"""Share of positions that near-ties may excuse: a wrong export is wrong everywhere."""


def compare_logits(reference: Tensor, logits: Tensor, margins: Tensor) -> dict[str, Any]:
    """Compare logits [N, V] position by position.

    A difference above the tolerance is put down to a router near-tie only where the routers really were that close
    (``margins`` [N]) at that position or an earlier one, which attention carries on; such positions are named and
    left out of ``max_abs``.

    Raises:
        L0MoEError: logits that are not finite, or more near-ties than there can be.
    """
    if not bool(torch.isfinite(reference).all() and torch.isfinite(logits).all()):
        raise L0MoEError(
            "The logits of Megatron or of the exported model are not finite; the training has diverged."
        )
    differences = (reference - logits).abs().amax(dim=-1)
    near_ties: list[dict[str, float | int]] = []
    compared: list[float] = []
    closest = float("inf")
    for position, difference in enumerate(differences.tolist()):
        closest = min(closest, float(margins[position]))
        if difference > LOGIT_ATOL and closest < NEAR_TIE_MARGIN:
            near_ties.append({"position": position, "difference": difference, "margin": closest})
        else:
            compared.append(difference)
    if len(near_ties) > len(differences) * LARGEST_NEAR_TIE_SHARE:
        raise L0MoEError(
            f"{len(near_ties)} of {len(differences)} positions differ between Megatron and the exported model, too "
            "many to be router near-ties; do not use the export, and report this as a bug."
        )
    return {
        "max_abs": max(compared, default=0.0),
        "median_abs": float(differences.median()),
        "positions": len(differences),
        "tolerance": LOGIT_ATOL,
        "near_ties": near_ties,
    }


@torch.no_grad()
def parity(megatron_logits: Path, export: Path) -> dict[str, Any]:
    """Return the comparison of a file that `training.logits` wrote with the export's own logits.

    Raises:
        L0MoEError: the two do not agree within the tolerance.
    """
    saved = load_file(megatron_logits)
    model = load_model(export, dtype="float32")
    logits = model(saved["tokens"][None]).logits[0].float()
    # Megatron pads the vocabulary to a multiple; the exported model has the real one.
    result = compare_logits(saved["logits"][:, : logits.shape[-1]], logits, saved["margins"])
    if result["max_abs"] > LOGIT_ATOL:
        raise L0MoEError(
            f"The exported model's logits differ from Megatron's by {result['max_abs']:.2e} "
            f"(at most {LOGIT_ATOL:.0e} is rounding); do not use {export}, and report this as a bug."
        )
    return result

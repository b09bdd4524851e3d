"""Least squares for fc2 after units were removed, and what is lost; fp64.

F = FFN channels, E = units kept, H = hidden, W = fc2 [H, F], G = sum a a^T [F, F] over the tokens, a = activations.
S = the units kept, R = the others.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_l0moe.errors import L0MoEError

ESCALATIONS = 4
"""How often the damping may be made ten times larger where rounding made the damped matrix indefinite."""


@dataclass(frozen=True, kw_only=True)
class Refit:
    """New columns of fc2 for the units kept."""

    down: Tensor
    """fp64 [H, E]."""
    damping: float
    """Fraction of the mean of G's diagonal that was added to it."""


def damped_cholesky(gram: Tensor, damping: float, scale: float) -> tuple[Tensor, float]:
    """Return the lower Cholesky factor of gram + damping * scale * I, and the damping that it took.

    Args:
        gram: fp64 [n, n], positive semidefinite up to rounding.
        damping: a fraction, made ten times larger where the factorisation fails.
        scale: what it is a fraction of, the mean of G's diagonal.

    Raises:
        L0MoEError: not even a damping of `damping` * 10^4 helps.
    """
    for escalation in range(ESCALATIONS + 1):
        tried = damping * 10.0**escalation
        damped = gram.clone()
        damped.diagonal().add_(tried * scale)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0 and bool(factor.isfinite().all()):
            return factor, tried
    raise L0MoEError(
        f"The sums of the units' activations cannot be inverted with a damping of {tried:g}; raise "
        "expert_training.calibration.tokens and expert_training.calibration.damping."
    )


def refit(fc2: Tensor, gram: Tensor, units: Tensor, damping: float) -> Refit:
    """Return the columns V [H, E] that minimise sum |W a - V a_S|^2 + lambda |V - W_S|^2.

    V = W_S + W_R G_RS (G_SS + lambda I)^-1, lambda = damping * mean(diag G): what Optimal Brain Compression's updates
    add up to when R is removed, in whatever order, with H = G + lambda I. Without units in R, V is W.

    Args:
        fc2: fp64 [H, F].
        gram: fp64 [F, F].
        units: int64 [E], the units kept.
        damping: a fraction, see `damped_cholesky`.
    """
    removed = torch.ones(gram.shape[0], dtype=torch.bool, device=gram.device)
    removed[units] = False
    if not bool(removed.any()):
        return Refit(down=fc2[:, units], damping=damping)
    factor, used = damped_cholesky(gram[units][:, units], damping, float(gram.diagonal().mean()))
    lost = fc2[:, removed] @ gram[removed][:, units]  # [H, E]
    down = fc2[:, units] + torch.cholesky_solve(lost.T, factor).T
    return Refit(down=down, damping=used)


def relative_error(fc2: Tensor, gram: Tensor, units: Tensor, down: Tensor) -> float:
    """Return sum |W a - V a_S|^2 / sum |W a|^2 over the calibration tokens, from G alone.

    Args:
        fc2: fp64 [H, F].
        gram: fp64 [F, F].
        units: int64 [E].
        down: V, fp64 [H, E].
    """
    difference = fc2.clone()
    difference[:, units] -= down
    energy = float(((fc2 @ gram) * fc2).sum())
    error = float(((difference @ gram) * difference).sum())
    return max(error, 0.0) / energy if energy > 0 else 0.0

"""Optimal Brain Surgeon for whole units: which to remove when fc2's other columns may make up for it; fp64.

n = units left, H = hidden, W = fc2 [H, n], Q = (G + lambda I)^-1 [n, n], G = sum a a^T of fc2's inputs.

Removing unit r costs |W_r|^2 / Q_rr, and the best repair is W -= W_r Q_r: / Q_rr, after which Q -= Q_:r Q_r: / Q_rr
(Optimal Brain Compression, structured: all rows of fc2 lose the same column, so the costs of the rows add up). One
unit goes at a time; the rank-one updates of Q and W are collected and applied for BLOCK units together.
"""

import torch
from torch import Tensor

from megatron_l0moe.experts.refit import damped_cholesky

BLOCK = 128


def keep_by_obs(fc2: Tensor, gram: Tensor, width: int, damping: float, *, block: int = BLOCK) -> Tensor:
    """Return the units that are left when the cheapest one was removed again and again; int64 [width], ascending.

    Cost: F^3 multiplications for Q, F^3 / 3 for its updates and F^2 H for the costs.

    Args:
        fc2: fp64 [H, F].
        gram: fp64 [F, F].
        width: units to keep.
        damping: lambda as a fraction of G's mean diagonal.
        block: updates that are collected; it changes no choice.
    """
    units = torch.arange(gram.shape[0], device=gram.device)
    if width == units.numel():
        return units
    factor, _ = damped_cholesky(gram, damping, float(gram.diagonal().mean()))
    inverse, weights = torch.cholesky_inverse(factor), fc2.clone()
    while units.numel() > width:
        count = min(block, units.numel() - width)
        left, columns, updates = _remove(inverse, weights, count)
        units = units[left]
        columns = columns[left]
        inverse = inverse[left][:, left] - columns @ columns.T
        weights = weights[:, left] - updates @ columns.T
    return units


def _remove(inverse: Tensor, weights: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choose `count` units one after another.

    Returns:
        bool [n], which are left; [n, count] and [H, count], the scaled columns of Q and of W when each was removed:
        their products are what Q and W lose.
    """
    total = inverse.shape[0]
    left = torch.ones(total, dtype=torch.bool, device=inverse.device)
    columns, updates = inverse.new_zeros(total, count), weights.new_zeros(weights.shape[0], count)
    diagonal, squares = inverse.diagonal().clone(), weights.square().sum(0)
    for i in range(count):
        cost = torch.where(left, squares.clamp(min=0) / diagonal, torch.inf)
        r = int(cost.argmin())
        left[r] = False
        column = inverse[:, r] - columns[:, :i] @ columns[r, :i]
        update = weights[:, r] - updates[:, :i] @ columns[r, :i]
        scale = column[r].sqrt()
        column, update = column / scale, update / scale
        # |W_j - update column_j|^2 for every unit j
        along = weights.T @ update - columns[:, :i] @ (updates[:, :i].T @ update)
        squares = squares - 2 * along * column + update.square().sum() * column.square()
        # Q stays positive definite; rounding must not say otherwise
        diagonal = (diagonal - column.square()).clamp(min=torch.finfo(diagonal.dtype).tiny)
        columns[:, i], updates[:, i] = column, update
    return left, columns, updates

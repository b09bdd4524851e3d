"""Units that span what a whitened, truncated SVD of the layer keeps; fp64.

F = FFN channels, E = units kept, H = hidden, W = fc2 [H, F], G = sum a a^T = L L^T [F, F], r = min(E, H).

A rank-r factorisation of an FFN's matrices is no SwiGLU of r units: the nonlinearity acts on units. So the SVD says
what to keep, and units are chosen to reproduce it. W L = U D V^T is the map of whitened activations to the output;
the r directions U_r of largest D hold the most of the output's energy. Of the targets U_r^T W a, the unit that
explains the most of what is left is taken, again and again: QR with column pivoting of the whitened activations,
which a pivoted Cholesky factorisation of G does without the activations.
"""

import torch
from torch import Tensor

RELATIVE_FLOOR = 1e-10
"""A unit whose activation is by so much of its energy a combination of chosen ones has nothing to add."""


def keep_by_svd(fc2: Tensor, gram: Tensor, width: int) -> Tensor:
    """Return the chosen units; int64 [width], ascending.

    Where fewer than `width` units are linearly independent, the largest of the others fill up. Cost: F^2 H for the
    targets, H^3 for the SVD, and E F (E + r) multiplications for the choice.

    Args:
        fc2: fp64 [H, F].
        gram: fp64 [F, F].
        width: E.
    """
    seen = fc2 @ gram  # [H, F]
    rank = min(width, fc2.shape[0])
    # left singular vectors of W L: eigenvectors of W G W^T
    directions = torch.linalg.eigh(seen @ fc2.T).eigenvectors[:, -rank:]  # [H, r]
    left = directions.T @ seen  # [r, F], covariances of targets and units
    rest = gram.diagonal().clone()  # of each unit, the energy that the chosen ones do not explain
    floor = (RELATIVE_FLOOR * rest).clamp(min=RELATIVE_FLOOR * float(rest.max()))
    whitened = gram.new_zeros(gram.shape[0], width)
    free = torch.ones_like(rest, dtype=torch.bool)
    for i in range(width):
        gain = torch.where(free & (rest > floor), left.square().sum(0) / rest, -1.0)
        j = int(gain.argmax())
        if float(gain[j]) <= 0:
            break
        free[j] = False
        column = (gram[:, j] - whitened[:, :i] @ whitened[j, :i]) / rest[j].sqrt()
        whitened[:, i] = column
        left = left - torch.outer(left[:, j] / rest[j].sqrt(), column)
        rest = rest - column.square()
    chosen = (~free).nonzero().flatten()
    if chosen.numel() < width:
        size = torch.where(free, fc2.square().sum(0) * gram.diagonal(), -1.0)
        more = torch.sort(size, descending=True, stable=True).indices[: width - chosen.numel()]
        chosen = torch.cat([chosen, more])
    return chosen.sort().values

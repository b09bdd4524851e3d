"""Cluster confusion matrix and order of the iterations: paper section 3.1, equations 4 and 5.

Shape letters: K = clusters, V = embedding dimension, Q = iterations. C_i = centres of iteration 0,
C_i^(l) = centres of iteration l. All in float64; centres need not be normalised, `sim` is the cosine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

Floats = npt.NDArray[np.float64]
SetOrder = Literal["ascending", "descending", "random"]
Centres = npt.NDArray[np.float32] | npt.NDArray[np.float64]


@dataclass(frozen=True)
class Confusion:
    """Terms of eq. 4 for one iteration, each [K]."""

    f1: Floats
    f2: Floats
    f3: Floats

    @property
    def ccm(self) -> Floats:
        """Column l of the matrix: CCM[i, l] = (f1 + f2) * f3 (eq. 4)."""
        return (self.f1 + self.f2) * self.f3


def cosine(a: Centres, b: Centres) -> Floats:
    """Return sim(a_i, b_j): [K, V] x [K, V] -> float64 [K, K]."""
    a64, b64 = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    norms = np.linalg.norm(a64, axis=1)[:, None] * np.linalg.norm(b64, axis=1)[None, :]
    return np.asarray(a64 @ b64.T / norms, dtype=np.float64)


def match_centres(
    initial: Centres, centres: Centres, *, method: Literal["hungarian", "none"]
) -> npt.NDArray[np.int64]:
    """Return the permutation m with ``centres[m[i]]`` paired to ``initial[i]``, int64 [K].

    k-means labels are arbitrary, but f2, f3 and the domain k of later sets need centre i of iteration l to
    correspond to centre i of iteration 0. "hungarian" maximises the sum of cosines; "none" keeps the labels.
    """
    if method == "none":
        return np.arange(len(initial), dtype=np.int64)
    _, columns = linear_sum_assignment(cosine(initial, centres), maximize=True)
    return np.asarray(columns, dtype=np.int64)


def confusion(initial: Centres, centres: Centres, *, delta: float) -> Confusion:
    """Return f1, f2, f3 of eq. 4 for one iteration; ``centres`` are already matched to ``initial``."""
    across = cosine(initial, centres)  # [i, k] = sim(C_i, C_k^(l))
    distance = np.exp(1.0 - across)
    # f3 is larger when the new centres lie closer to each other than the initial ones did; kept as printed.
    within_new = np.exp(cosine(centres, centres)).sum(axis=0)
    within_initial = np.exp(cosine(initial, initial)).sum(axis=0)
    return Confusion(
        f1=distance.mean(axis=1),  # initial centre i against all new centres
        f2=distance.mean(axis=0),  # new centre i against all initial centres
        f3=delta * within_new / within_initial,
    )


def semantic_distance(ccm: Floats, *, beta: float) -> float:
    """Return d_ds^(l) = max_i CCM[i, l] + beta / K * sum_i CCM[i, l] (eq. 5); ``ccm`` is column l, [K]."""
    return float(ccm.max() + beta * ccm.mean())


def training_order(distances: Sequence[float], *, order: SetOrder, seed: int) -> list[int]:
    """Return the iteration numbers 1..Q-1 in training order; ``distances[l - 1]`` is d_ds^(l).

    "ascending" is the paper's; "random" its ablation, which does not look at the distances; "descending" is the
    ascending order read backwards.
    """
    if order == "random":
        shuffled = np.random.default_rng((seed, len(distances))).permutation(len(distances))
        return [int(position) + 1 for position in shuffled]
    ascending = ascending_order(distances)
    return ascending if order == "ascending" else ascending[::-1]


def ascending_order(distances: Sequence[float]) -> list[int]:
    """Return the iteration numbers 1..Q-1 by ascending d_ds, ties by number; ``distances[l - 1]`` is d_ds^(l)."""
    order = np.argsort(np.asarray(distances, dtype=np.float64), kind="stable")
    return [int(position) + 1 for position in order]

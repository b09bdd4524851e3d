"""Two models' scores on the same documents: difference and ratio, with standard errors that use the pairing.

Legend: d_i, m_i value of document i for the dense model and the L0-MoE; D, M their means; n documents of a task.
A group is the mean over its tasks weighted by their documents, w_k = n_k / N; a task alone has one weight, 1.

    difference  M - D     variance  sum_k w_k^2 S^2_k(m - d) / n_k
    ratio       r = M / D variance  sum_k w_k^2 S^2_k(m - r d) / (n_k D^2)

with S^2_k the sample variance (divisor n_k - 1) in task k. The second is the linearised (delta method) variance of
a ratio of means of paired values (Cochran, Sampling Techniques, 3rd edition, chapter 6). Both models answer the
same documents, so an error of the two scores taken as independent would be too large.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Pairs = Sequence[tuple[float, float]]
"""(dense, L0-MoE) values of one task's documents."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and its standard error; None: not defined."""

    value: float | None
    stderr: float | None

    def to_json(self) -> dict[str, float | None]:
        """Return a plain dict."""
        return {"value": self.value, "stderr": self.stderr}


def difference(tasks: Sequence[Pairs]) -> Estimate:
    """Return the L0-MoE's mean minus the dense model's."""
    return Estimate(
        value=_mean(tasks, 1) - _mean(tasks, 0),
        stderr=_stderr([[moe - dense for dense, moe in pairs] for pairs in tasks]),
    )


def ratio(tasks: Sequence[Pairs]) -> Estimate:
    """Return the L0-MoE's mean / the dense model's; not defined where the dense model scores 0."""
    dense_mean = _mean(tasks, 0)
    if dense_mean == 0.0:
        return Estimate(value=None, stderr=None)
    value = _mean(tasks, 1) / dense_mean
    stderr = _stderr([[moe - value * dense for dense, moe in pairs] for pairs in tasks])
    return Estimate(value=value, stderr=None if stderr is None else stderr / abs(dense_mean))


def _mean(tasks: Sequence[Pairs], which: int) -> float:
    """Return the mean over all documents of all tasks, which is the mean weighted by the tasks' documents."""
    values = [pair[which] for pairs in tasks for pair in pairs]
    return math.fsum(values) / len(values)


def _stderr(tasks: Sequence[Sequence[float]]) -> float | None:
    """Return the standard error of the mean over all values, stratified by task; None with one value in a task."""
    if any(len(values) < 2 for values in tasks):
        return None
    total = sum(len(values) for values in tasks)
    return math.sqrt(math.fsum(len(values) * statistics.variance(values) for values in tasks)) / total

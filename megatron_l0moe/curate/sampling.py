"""Q disjoint random subsets of the documents, and what each of their clusters contributes (paper section 3.1).

Shape letters: N = documents, Q = iterations, K = clusters, S = sequence length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_l0moe.errors import L0MoEError

OVERSAMPLING = 8.0
"""A subset holds at most this many times the tokens that are taken from it. Clusters are unequal and each must
fill the same budget, so the smallest one may be this many times smaller than the mean."""
TOKENISE_MARGIN = 1.1
"""Tokenise this many times what the estimate says is needed, so that one pass over the corpus is enough."""

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
WRITTEN = np.dtype([("id", "<i8"), ("shard", "<u4"), ("doc", "<u4"), ("length", "<i4")])
"""A tokenised document: catalog number, shard of the iteration, number in that shard, tokens with EOD."""


@dataclass(frozen=True)
class Budget:
    """What each cluster of one iteration must yield."""

    iteration: int
    sequences: int
    seq_length: int
    setting: str
    """Recipe key that asks for it."""
    share: int
    """Clusters that share the setting's tokens: 1 for tokens_per_expert, K for tokens_per_set."""

    @property
    def tokens(self) -> int:
        """Tokens of one cluster; the last label of the last sequence lies one token further."""
        return self.sequences * self.seq_length + 1


def draw_subsets(ids: Ids, tokens: Floats, needs: Sequence[int], *, seed: int) -> list[Ids]:
    """Split documents into Q disjoint random subsets whose tokens are in the proportion of ``needs``.

    Args:
        ids: documents that may be used, [N].
        tokens: estimated usable tokens of each, [N].
        needs: tokens that each iteration must yield, [Q].
        seed: of the random order.

    Returns:
        Q arrays of ids in random order. All documents are used unless that would be more than ``OVERSAMPLING``
        times the need: embedding is what a large corpus costs.

    Raises:
        L0MoEError: all documents together have fewer tokens than needed.
    """
    total, need = float(tokens.sum()), sum(needs)
    if total < need:
        raise L0MoEError(
            f"The corpus has about {total:.0f} tokens outside the held-out documents, but the recipe's {len(needs)} "
            f"iterations need {need}; add text or lower data.tokens_per_expert, data.tokens_per_set or data.iterations."
        )
    order = np.random.default_rng(seed).permutation(len(ids))
    scale = min(OVERSAMPLING, total / need)
    ends = np.cumsum(tokens[order])
    cuts = np.searchsorted(ends, np.cumsum(np.asarray(needs, dtype=np.float64)) * scale, side="left") + 1
    cuts = np.minimum(cuts, len(ids))
    return np.split(ids[order], cuts)[: len(needs)]


class ClusterFiller:
    """Fills every cluster's budget with documents of one iteration's subset, in its random order."""

    def __init__(
        self, subset: Ids, assignment: Ids, estimate: Floats, budget: Budget, *, num_clusters: int
    ) -> None:
        """Begin with empty clusters.

        Args:
            subset: document ids in random order, [N].
            assignment: cluster of each, [N].
            estimate: tokens of each, [N].
            budget: of each cluster.
            num_clusters: K.
        """
        self.budget = budget
        self.clusters = [np.empty(0, dtype=WRITTEN) for _ in range(num_clusters)]
        """Documents of each cluster in random order, [n] of ``WRITTEN``, just enough for the budget; a document may
        be cut to it."""
        members = [assignment == k for k in range(num_clusters)]
        self._waiting = [(subset[m], estimate[m]) for m in members]
        self._chosen = [np.empty(0, dtype=np.int64) for _ in range(num_clusters)]

    def choose(self) -> Ids:
        """Take as many further documents as the estimate says are needed; none if that is not possible."""
        for k, (ids, estimate) in enumerate(self._waiting):
            need = self.budget.tokens - self._total(k)
            count = _reaching(estimate, need * TOKENISE_MARGIN) if need > 0 else 0
            self._chosen[k] = ids[:count]
            self._waiting[k] = ids[count:], estimate[count:]
        return np.concatenate(self._chosen)

    def add(self, written: npt.NDArray[np.void]) -> None:
        """Put the documents that were chosen last into their clusters, until these are full.

        Args:
            written: all of them, [n] of ``WRITTEN``, by ascending id.
        """
        for k, ids in enumerate(self._chosen):
            mine = written[np.searchsorted(written["id"], ids)]
            assert np.array_equal(mine["id"], ids), "a document was not written"
            count = _reaching(mine["length"], self.budget.tokens - self._total(k))
            self.clusters[k] = np.concatenate([self.clusters[k], mine[:count]])

    def check_filled(self) -> None:
        """Check that every cluster has its budget; documents are never repeated."""
        totals = [self._total(k) for k in range(len(self.clusters))]
        smallest = int(np.argmin(totals))
        have, budget = totals[smallest], self.budget
        if have >= budget.tokens:
            return
        possible = max(have - 1, 0) // budget.seq_length * budget.seq_length * budget.share
        fix = f"lower {budget.setting} to at most {possible}" if possible else "use fewer model.num_experts"
        raise L0MoEError(
            f"Cluster {smallest} of iteration {budget.iteration} has {have} tokens in {len(self.clusters[smallest])} "
            f"documents but needs {budget.tokens} ({budget.sequences} sequences of {budget.seq_length}), and documents "
            f"are never repeated; {fix}, or add text to data.corpus."
        )

    def _total(self, cluster: int) -> int:
        return int(self.clusters[cluster]["length"].sum(dtype=np.int64))


Write = Callable[[Sequence[ClusterFiller], Sequence[Ids]], list[npt.NDArray[np.void]]]
"""Tokenises the chosen documents of each filler; returns an array of ``WRITTEN`` for each, by ascending id."""


def fill_clusters(fillers: Sequence[ClusterFiller], write: Write) -> None:
    """Choose documents by the estimate, tokenise them, and go on where a cluster is still short.

    Usually one round is enough. Only documents that are needed are tokenised.
    """
    while any(map(len, chosen := [filler.choose() for filler in fillers])):
        for filler, written in zip(fillers, write(fillers, chosen), strict=True):
            filler.add(written)
    for filler in fillers:
        filler.check_filled()


def _reaching(amounts: npt.NDArray[np.generic], need: float) -> int:
    """Return how many of the first amounts together reach ``need``; all, if they do not."""
    if need <= 0:
        return 0
    return min(int(np.searchsorted(np.cumsum(amounts), need, side="left")) + 1, len(amounts))

"""Q disjoint random subsets of the documents, and what each of their clusters contributes (paper section 3.1).

Shape letters: N = documents, Q = iterations, K = clusters, S = sequence length.
"""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_l0moe.data.catalog import Catalog, read_documents
from megatron_l0moe.data.indexed import CorpusTokenizer, write_shard
from megatron_l0moe.errors import L0MoEError

logger = logging.getLogger(__name__)

OVERSAMPLING = 8.0
"""A subset holds at most this many times the tokens that are taken from it. Clusters are unequal and each must
fill the same budget, so the smallest one may be this many times smaller than the mean."""
TOKENISE_MARGIN = 1.1
"""Tokenise this many times what the estimate says is needed, so that one pass over the corpus is enough."""

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


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


@dataclass
class ClusterDocuments:
    """Tokenised documents of one cluster in random order, just enough for the budget; the last may be cut."""

    ids: list[int] = field(default_factory=list)
    """Catalog numbers."""
    shard: list[int] = field(default_factory=list)
    """Number of the shard within the iteration."""
    doc: list[int] = field(default_factory=list)
    """Number of the document within its shard."""
    lengths: list[int] = field(default_factory=list)
    """Tokens with EOD."""


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


def tokenise_iteration(
    catalog: Catalog,
    subset: Ids,
    assignment: Ids,
    estimate: Floats,
    budget: Budget,
    tokenizer: CorpusTokenizer,
    folder: Path,
    *,
    num_clusters: int,
) -> list[ClusterDocuments]:
    """Fill every cluster's budget with documents of ``subset`` in its order, and write them to shards.

    Only documents that are needed are tokenised, each to at most the budget. Usually one pass over the corpus and
    one shard are enough; a cluster whose documents were shorter than estimated gets another.

    Args:
        catalog: of the corpus.
        subset: document ids in random order, [N].
        assignment: cluster of each, [N].
        estimate: tokens of each, [N].
        budget: of each cluster.
        tokenizer: of the base model.
        folder: where shard_00000.bin/.idx and so on are written.
        num_clusters: K.

    Returns:
        K entries.

    Raises:
        L0MoEError: a cluster has too little text; documents are never repeated.
    """
    members = [assignment == k for k in range(num_clusters)]
    waiting = [deque(zip(subset[m].tolist(), estimate[m].tolist(), strict=True)) for m in members]
    clusters = [ClusterDocuments() for _ in range(num_clusters)]
    for shard in range(len(subset) + 1):
        chosen = {
            k: _next_documents(waiting[k], budget.tokens - sum(cluster.lengths))
            for k, cluster in enumerate(clusters)
            if sum(cluster.lengths) < budget.tokens
        }
        if not any(chosen.values()):
            break
        ids = np.array([document for documents in chosen.values() for document in documents], dtype=np.int64)
        texts = ((i, document.text, budget.tokens) for i, document in read_documents(catalog, ids))
        stored, lengths = write_shard(folder / f"shard_{shard:05d}", texts, tokenizer, count=len(ids))
        place = {document: (number, lengths[number]) for number, document in enumerate(stored)}
        for k, documents in chosen.items():
            _append(clusters[k], shard, [(i, *place[i]) for i in documents], budget.tokens)
    _check_filled(clusters, budget)
    return clusters


def _next_documents(waiting: deque[tuple[int, float]], tokens: int) -> list[int]:
    """Take documents from the front of ``waiting`` until their estimate covers ``tokens`` with a margin."""
    taken: list[int] = []
    expected = 0.0
    while waiting and expected < tokens * TOKENISE_MARGIN:
        document, estimate = waiting.popleft()
        taken.append(document)
        expected += estimate
    return taken


def _append(
    cluster: ClusterDocuments, shard: int, documents: Sequence[tuple[int, int, int]], need: int
) -> None:
    """Add (id, doc, length) entries until the cluster has ``need`` tokens."""
    total = sum(cluster.lengths)
    for document, number, length in documents:
        if total >= need:
            return
        cluster.ids.append(document)
        cluster.shard.append(shard)
        cluster.doc.append(number)
        cluster.lengths.append(length)
        total += length


def _check_filled(clusters: Sequence[ClusterDocuments], budget: Budget) -> None:
    totals = [sum(cluster.lengths) for cluster in clusters]
    smallest = int(np.argmin(totals))
    have = totals[smallest]
    if have >= budget.tokens:
        return
    possible = max(have - 1, 0) // budget.seq_length * budget.seq_length * budget.share
    fix = f"lower {budget.setting} to at most {possible}" if possible else "use fewer model.num_experts"
    raise L0MoEError(
        f"Cluster {smallest} of iteration {budget.iteration} has {have} tokens in {len(clusters[smallest].ids)} "
        f"documents but needs {budget.tokens} ({budget.sequences} sequences of {budget.seq_length}), and documents "
        f"are never repeated; {fix}, or add text to data.corpus."
    )

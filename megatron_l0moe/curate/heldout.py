"""The held-out split: whole documents of every source domain that never enter training (for perplexity).

Shape letters: N = documents, S = sequence length.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_l0moe.curate.corpus.catalog import Catalog, read_documents
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.index.tokens import CorpusTokenizer, Tokens
from megatron_l0moe.runs.stage_folder import write_text

logger = logging.getLogger(__name__)

EXPECTED_CHARS_PER_TOKEN = 8
"""How much text of a domain is read first; ordinary text has 3 to 5, so one pass over the corpus is the rule."""
NOMINAL_TOKENS_PER_CHAR = 0.25
"""An assumption for a domain whose held-out documents are all too long to have been tokenised whole."""


@dataclass(frozen=True)
class HeldOutSequence:
    """One packed held-out sequence."""

    tokens: Tokens
    """[S + 1]."""
    domain: int
    first_document: int
    """Catalog number of the document that holds the first token."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out documents, their sequences, and what they tell about the length of the others."""

    ids: npt.NDArray[np.int64]
    sequences: list[HeldOutSequence]
    tokens_per_char: npt.NDArray[np.float64]
    """[number of domains], measured on the held-out documents."""


def hold_out(
    catalog: Catalog, tokenizer: CorpusTokenizer, *, tokens_per_domain: int, seq_length: int, seed: int
) -> HeldOut:
    """Pick documents of each domain in a random order that depends on their place in the corpus and the seed only.

    A domain gives ``tokens_per_domain // seq_length`` sequences, packed like training sequences; a sequence's last
    label is the next one's first token.

    Raises:
        L0MoEError: the budget is less than one sequence, or a domain has too little text, or nothing would be left
            of it for training.
    """
    count = tokens_per_domain // seq_length
    if not count:
        raise L0MoEError(
            f"data.heldout_tokens_per_domain ({tokens_per_domain}) is less than one sequence; set it to at least "
            f"data.seq_length ({seq_length})."
        )
    need = count * seq_length + 1
    queues = _random_queues(catalog, seed)
    taken: list[list[tuple[int, Tokens]]] = [[] for _ in queues]
    expected_chars = need * EXPECTED_CHARS_PER_TOKEN
    while short := [domain for domain, documents in enumerate(taken) if _total(documents) < need]:
        candidates = [
            _prefix(catalog, queues[domain], len(taken[domain]), expected_chars) for domain in short
        ]
        _check_left(catalog, short, candidates, taken, need)
        tokens = _tokenise(catalog, tokenizer, np.concatenate(candidates), need)
        for domain, ids in zip(short, candidates, strict=True):
            for i in ids:
                if _total(taken[domain]) < need:
                    taken[domain].append((int(i), tokens[int(i)]))
    _check_training_text(catalog, queues, taken)
    sequences = [
        s for domain, documents in enumerate(taken) for s in _pack(documents, domain, count, seq_length)
    ]
    held = np.array([i for documents in taken for i, _ in documents], dtype=np.int64)
    logger.info("held out: %d documents, %d sequences of %d tokens", len(held), len(sequences), seq_length)
    return HeldOut(held, sequences, _density(catalog, taken, need))


def write_heldout(
    path: Path, sequences: Sequence[HeldOutSequence], clusters: Sequence[int], domains: list[str]
) -> None:
    """Write one JSON line a sequence; ``clusters[i]`` is the cluster of sequence i's first document."""
    lines = [
        json.dumps({"tokens": s.tokens.tolist(), "domain": domains[s.domain], "cluster": int(cluster)})
        for s, cluster in zip(sequences, clusters, strict=True)
    ]
    write_text(path, "\n".join(lines) + "\n")


def _random_queues(catalog: Catalog, seed: int) -> list[npt.NDArray[np.int64]]:
    """Return for each domain its document ids in random order."""
    keys, domain_of = catalog.random_keys(seed), catalog.rows["domain"]
    members = [np.flatnonzero(domain_of == domain) for domain in range(len(catalog.domains))]
    return [ids[np.argsort(keys[ids], kind="stable")] for ids in members]


def _prefix(catalog: Catalog, queue: npt.NDArray[np.int64], start: int, chars: int) -> npt.NDArray[np.int64]:
    """Return the next documents of a queue, from ``start``, that have ``chars`` characters together."""
    ends = np.cumsum(catalog.rows["chars"][queue[start:]])
    return queue[start : start + int(np.searchsorted(ends, chars)) + 1]


def _tokenise(
    catalog: Catalog, tokenizer: CorpusTokenizer, ids: npt.NDArray[np.int64], limit: int
) -> dict[int, Tokens]:
    """Return the tokens of each document, cut at ``limit``, with EOD."""
    return {i: tokenizer.encode([document.text], [limit])[0] for i, document in read_documents(catalog, ids)}


def _pack(
    documents: list[tuple[int, Tokens]], domain: int, count: int, seq_length: int
) -> list[HeldOutSequence]:
    stream = np.concatenate([tokens for _, tokens in documents])
    ends = np.cumsum([len(tokens) for _, tokens in documents])
    starts = np.arange(count) * seq_length
    first = np.searchsorted(ends, starts, side="right")
    return [
        HeldOutSequence(stream[start : start + seq_length + 1], domain, documents[number][0])
        for start, number in zip(starts, first, strict=True)
    ]


def _density(catalog: Catalog, taken: list[list[tuple[int, Tokens]]], limit: int) -> npt.NDArray[np.float64]:
    """Return tokens per character of each domain, from the documents that were not cut."""
    density = []
    for documents in taken:
        uncut = [(i, tokens) for i, tokens in documents if len(tokens) <= limit]
        chars = sum(int(catalog.rows["chars"][i]) for i, _ in uncut)
        density.append(_total(uncut) / chars if chars else NOMINAL_TOKENS_PER_CHAR)
    return np.array(density)


def _total(documents: list[tuple[int, Tokens]]) -> int:
    return sum(len(tokens) for _, tokens in documents)


def _check_left(
    catalog: Catalog,
    short: list[int],
    candidates: list[npt.NDArray[np.int64]],
    taken: list[list[tuple[int, Tokens]]],
    need: int,
) -> None:
    for domain, ids in zip(short, candidates, strict=True):
        if not len(ids):
            raise L0MoEError(
                f"Source domain {catalog.domains[domain]!r} has only {_total(taken[domain])} tokens in "
                f"{len(taken[domain])} documents, but {need} must be held out; lower data.heldout_tokens_per_domain, "
                "or give the domain more text."
            )


def _check_training_text(
    catalog: Catalog, queues: list[npt.NDArray[np.int64]], taken: list[list[tuple[int, Tokens]]]
) -> None:
    for domain, (queue, documents) in enumerate(zip(queues, taken, strict=True)):
        if len(queue) == len(documents):
            raise L0MoEError(
                f"Holding out text of source domain {catalog.domains[domain]!r} takes all of its {len(queue)} "
                "documents and leaves none for training; lower data.heldout_tokens_per_domain, or give the domain "
                "more documents."
            )

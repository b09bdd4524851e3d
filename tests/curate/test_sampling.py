"""Sampling: disjoint subsets in the right proportion, exact budgets, no document twice."""

from pathlib import Path

import numpy as np
import pytest
from curated import scan_corpus
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_l0moe.curate.corpus.catalog import Catalog, read_documents
from megatron_l0moe.curate.sampling import (
    OVERSAMPLING,
    WRITTEN,
    Budget,
    ClusterFiller,
    draw_subsets,
    fill_clusters,
)
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.index.tokens import CorpusTokenizer, write_documents


def test_subsets_are_disjoint_and_proportional() -> None:
    ids = np.arange(100, 1100)
    tokens = np.random.default_rng(0).uniform(10, 100, size=1000)
    needs = [8000, 2000, 4000]
    subsets = draw_subsets(ids, tokens, needs, seed=5)
    together = np.concatenate(subsets)
    assert (
        len(set(together.tolist())) == len(together) == 1000
    )  # all are used: less than OVERSAMPLING times the need
    share = np.array([tokens[subset - 100].sum() for subset in subsets]) / tokens.sum()
    np.testing.assert_allclose(
        share, np.array(needs) / 14000, atol=100 / tokens.sum() * 2
    )  # one document at each cut
    assert not np.array_equal(np.sort(subsets[0]), subsets[0])  # random order
    assert all(map(np.array_equal, subsets, draw_subsets(ids, tokens, needs, seed=5)))
    assert not np.array_equal(subsets[0], draw_subsets(ids, tokens, needs, seed=6)[0])


def test_a_large_corpus_is_not_used_whole() -> None:
    subsets = draw_subsets(np.arange(10_000), np.ones(10_000), [30, 20], seed=0)
    assert [len(subset) for subset in subsets] == [30 * OVERSAMPLING, 20 * OVERSAMPLING]


def test_too_little_text() -> None:
    with pytest.raises(
        L0MoEError, match=r"about 50 tokens outside the held-out documents, .* 2 iterations need 51; add"
    ):
        draw_subsets(np.arange(5), np.full(5, 10.0), [30, 21], seed=0)


@pytest.fixture
def catalog(tmp_path: Path, write_lines) -> Catalog:
    records = [{"text": f"document {i} " + "abc " * (i % 7 + 1)} for i in range(40)]
    write_lines(tmp_path / "corpus" / "a.jsonl", records)
    return scan_corpus(tmp_path / "corpus")


def fill(catalog: Catalog, tiny_lm: Path, folder: Path, budget: Budget, estimate: float) -> list:
    subset = np.random.default_rng(1).permutation(40)
    filler = ClusterFiller(subset, subset % 2, np.full(40, estimate), budget, num_clusters=2)
    fill_clusters([filler], writer(catalog, tiny_lm, folder))
    return filler.clusters


def writer(catalog: Catalog, tiny_lm: Path, folder: Path):
    """Tokenise the documents of the one filler in this process, a shard for each round."""
    tokenizer = CorpusTokenizer.load(tiny_lm)
    folder.mkdir()

    def write(fillers, chosen):
        shard = len(list(folder.glob("*.bin")))
        ids = chosen[0]
        texts = ((i, d.text, fillers[0].budget.tokens) for i, d in read_documents(catalog, ids))
        written = write_documents(folder / f"shard_{shard:05d}", texts, tokenizer, lambda count: None)
        return [np.array([(i, shard, n, length) for n, (i, length) in enumerate(written)], dtype=WRITTEN)]

    return write


@pytest.mark.parametrize("estimate", [10.0, 60.0], ids=["pessimistic", "optimistic"])
def test_budget_is_filled_whatever_the_estimate(catalog, tiny_lm, tmp_path, estimate: float) -> None:
    """Optimistic estimates choose too few documents at first; further shards are then written."""
    budget = Budget(iteration=1, sequences=12, seq_length=10, setting="data.tokens_per_set", share=2)
    clusters = fill(catalog, tiny_lm, tmp_path / "out", budget, estimate)
    shards = [IndexedDataset(str(p.with_suffix(""))) for p in sorted((tmp_path / "out").glob("*.bin"))]
    assert (len(shards) > 1) == (estimate == 60.0)
    order = [int(i) for i in np.random.default_rng(1).permutation(40)]
    for k, cluster in enumerate(clusters):
        assert sum(cluster["length"]) >= 121 > sum(cluster["length"][:-1])
        # leading documents, in random order
        assert cluster["id"].tolist() == [i for i in order if i % 2 == k][: len(cluster)]
        tokenizer = CorpusTokenizer.load(tiny_lm)
        for i, shard, doc, length in cluster.tolist():
            text = f"document {i} " + "abc " * (i % 7 + 1)
            assert shards[shard][doc].tolist() == tokenizer.encode([text], [999])[0].tolist()
            assert length == len(shards[shard][doc])
    assert not set(clusters[0]["id"]) & set(clusters[1]["id"])


def test_a_long_document_is_used_up_to_the_budget(tiny_lm, tmp_path, write_lines) -> None:
    write_lines(tmp_path / "corpus" / "a.jsonl", [{"text": "abc " * 100_000}, {"text": "b " * 50}])
    budget = Budget(iteration=0, sequences=3, seq_length=10, setting="data.tokens_per_expert", share=1)
    filler = ClusterFiller(np.array([0, 1]), np.array([0, 0]), np.array([1e5, 50.0]), budget, num_clusters=1)
    fill_clusters([filler], writer(scan_corpus(tmp_path / "corpus"), tiny_lm, tmp_path / "out"))
    assert filler.clusters[0]["id"].tolist() == [0]
    assert filler.clusters[0]["length"].tolist() == [31 + 1]  # 3 * 10 + 1 tokens and EOD


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            Budget(0, 200, 10, "data.tokens_per_expert", 1),
            r"of iteration 0 has \d+ tokens in 20 documents but needs 2001 .*lower data\.tokens_per_expert to at most",
        ),
        (
            Budget(2, 200, 10, "data.tokens_per_set", 2),
            r"of iteration 2 .* never repeated; lower data\.tokens_per_set to at most",
        ),
        (Budget(2, 1, 5000, "data.tokens_per_set", 2), r"use fewer model\.num_experts"),
    ],
    ids=["expert", "set", "hopeless"],
)
def test_a_small_cluster_stops_the_run(catalog, tiny_lm, tmp_path, budget: Budget, message: str) -> None:
    with pytest.raises(L0MoEError, match=message):
        fill(catalog, tiny_lm, tmp_path / "out", budget, 20.0)


def test_the_budget_that_the_message_names_works(catalog, tiny_lm, tmp_path) -> None:
    with pytest.raises(L0MoEError) as stopped:
        fill(catalog, tiny_lm, tmp_path / "out", Budget(1, 200, 10, "data.tokens_per_set", 2), 20.0)
    tokens = int(str(stopped.value).split("at most ")[1].split(",")[0])
    fill(
        catalog, tiny_lm, tmp_path / "again", Budget(1, tokens // 2 // 10, 10, "data.tokens_per_set", 2), 20.0
    )
    with pytest.raises(L0MoEError):
        fill(
            catalog,
            tiny_lm,
            tmp_path / "more",
            Budget(1, tokens // 2 // 10 + 1, 10, "data.tokens_per_set", 2),
            20.0,
        )

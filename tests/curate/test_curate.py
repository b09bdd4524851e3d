"""The whole stage on 60 documents of three topics, with a real tokenizer and a real (random) BERT encoder."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from curate_worlds import DOMAINS, GBS, K, P, Q, S, make_recipe
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_l0moe.curate.ccm import confusion, semantic_distance
from megatron_l0moe.curate.curate import curate, plan_budgets
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.index.dataset import CurriculumDataset
from megatron_l0moe.index.tokens import CorpusTokenizer
from megatron_l0moe.recipe.recipe import Recipe


@pytest.fixture
def corpus(tmp_path: Path, write_lines, topic_text) -> Path:
    folder = tmp_path / "corpus"
    for half, suffix in ((0, "jsonl"), (1, "jsonl.zst")):
        records = [
            {"text": topic_text(domain, seed, 40 + seed), "meta": {"source": domain}}
            for seed in range(half * 10, half * 10 + 10)
            for domain in DOMAINS
        ]
        write_lines(folder / f"part{half}.{suffix}", records)
    return folder


@pytest.fixture
def recipe(corpus: Path, tiny_lm: Path, tiny_encoder: Path) -> Recipe:
    return make_recipe(corpus, tiny_lm, tiny_encoder)


def corpus_texts(corpus: Path) -> list[str]:
    import zstandard

    lines = (corpus / "part0.jsonl").read_bytes().splitlines()
    packed = (corpus / "part1.jsonl.zst").read_bytes()
    lines += zstandard.ZstdDecompressor().decompress(packed).splitlines()
    return [json.loads(line)["text"] for line in lines]


def checksums(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
        and p.name != "summary.json"
        and folder / "work" not in p.parents  # the first holds seconds
    }


def test_end_to_end(recipe: Recipe, corpus: Path, tiny_lm: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = curate(recipe, out)
    assert json.loads((out / "summary.json").read_text()) == summary

    # What is there, and nothing else.
    names = {path.split("/")[0] for path in checksums(out)}
    indexes = {f"{name}.ccm.{end}" for name in ("expert_000", "expert_001", "expert_002", "moe")
               for end in ("json", "docs.npy", "samples.npy")}  # fmt: skip
    assert names == indexes | {
        "iter_000",
        "iter_001",
        "iter_002",
        "heldout.jsonl",
        "clusters.npz",
        "ccm.json",
    }

    # Sizes are those that the recipe promises.
    experts = [CurriculumDataset(out / f"expert_{k:03d}", vocab_size=512, seq_length=S) for k in range(K)]
    moe = CurriculumDataset(out / "moe", vocab_size=512, seq_length=S)
    assert [len(dataset) for dataset in experts] == [recipe.expert_steps * GBS] * K == [8] * K
    assert len(moe) == recipe.moe_steps * recipe.moe_global_batch_size == 2 * 2 * K * P
    for k, dataset in enumerate(experts):
        assert {int(dataset[i]["domain"]) for i in range(len(dataset))} == {k}

    # Every training document is one corpus document, whole or cut, and no document is used twice or held out.
    tokenizer = CorpusTokenizer.load(tiny_lm)
    whole = {tuple(tokenizer.encode([text], [10**6])[0][:-1].tolist()) for text in corpus_texts(corpus)}
    used = []
    for prefix in sorted(out.glob("iter_*/*.bin")):
        used += [tuple(document.tolist()[:-1]) for document in IndexedDataset(str(prefix.with_suffix("")))]
    origins = [[text for text in whole if text[: len(document)] == document] for document in used]
    assert [len(origin) for origin in origins] == [1] * len(used)
    assert len({origin[0] for origin in origins}) == len(used)
    lines = [json.loads(line) for line in (out / "heldout.jsonl").read_text().splitlines()]
    assert [line["domain"] for line in lines] == [d for d in DOMAINS for _ in range(2)]
    assert all(len(line["tokens"]) == S + 1 and 0 <= line["cluster"] < K for line in lines)
    first_of_domain = [tuple(lines[i]["tokens"]) for i in (0, 2, 4)]
    for start in first_of_domain:
        assert any(text[: S + 1] == start for text in whole)
        assert not any(document[: S + 1] == start for document in used)

    # ccm.json is eq. 4 and 5 of clusters.npz.
    centres = np.load(out / "clusters.npz")["centres"]
    ccm = json.loads((out / "ccm.json").read_text())
    assert centres.shape == (Q, K, 32)
    for number in (1, 2):
        terms = confusion(centres[0], centres[number], delta=0.1)
        assert ccm["ccm"][number - 1] == terms.ccm.tolist()
        assert ccm["d_ds"][number - 1] == semantic_distance(terms.ccm, beta=0.5)
    assert ccm["order"] == moe.header.order == sorted((1, 2), key=lambda number: ccm["d_ds"][number - 1])

    # The counts add up.
    assert summary["documents"]["corpus"] == 60
    assert (
        sum(summary["dropped"].values()) + summary["documents"]["heldout"] + summary["documents"]["training"]
        == 60
    )
    assert np.sum(summary["table"]) == np.sum(summary["documents_per_cluster"][0])
    assert summary["domains"] == list(DOMAINS)


def test_same_recipe_same_bytes_and_another_seed_not(recipe: Recipe, tmp_path: Path) -> None:
    curate(recipe, tmp_path / "a")
    curate(recipe, tmp_path / "b")
    assert checksums(tmp_path / "a") == checksums(tmp_path / "b")
    curate(recipe.model_copy(update={"seed": 12}), tmp_path / "c")
    assert checksums(tmp_path / "a") != checksums(tmp_path / "c")


def test_replay_of_the_initial_set(corpus, tiny_lm, tiny_encoder, tmp_path) -> None:
    """MoE training first sees sequences that the experts saw, domain by domain, then the ordered sets."""
    out = tmp_path / "out"
    curate(make_recipe(corpus, tiny_lm, tiny_encoder, include_initial_tokens=K * P * S), out)
    moe = CurriculumDataset(out / "moe")
    assert moe.header.order[0] == 0
    assert moe.header.iteration_start_samples[:2] == [0, K * P]
    replayed = [moe[i] for i in range(K * P)]
    for k in range(K):
        expert = CurriculumDataset(out / f"expert_{k:03d}")
        mine = [item["tokens"].tolist() for item in replayed if int(item["domain"]) == k]
        assert mine == [expert[i]["tokens"].tolist() for i in range(P)]


def test_several_passes_through_the_sets(corpus, tiny_lm, tiny_encoder, tmp_path) -> None:
    """A second pass is the first again, set by set; more than that is not repeated."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    curate(make_recipe(corpus, tiny_lm, tiny_encoder), once)
    curate(make_recipe(corpus, tiny_lm, tiny_encoder, set_passes=2), twice)
    one, two = CurriculumDataset(once / "moe"), CurriculumDataset(twice / "moe")
    assert two.header.order == one.header.order * 2
    assert len(two) == 2 * len(one)
    for domain in range(K):

        def of_domain(moe: CurriculumDataset, samples: range, domain: int = domain) -> list[list[int]]:
            items = [moe[i] for i in samples]
            return [item["tokens"].tolist() for item in items if int(item["domain"]) == domain]

        first = of_domain(one, range(len(one)))
        assert of_domain(two, range(len(one))) == of_domain(two, range(len(one), len(two))) == first
        assert len({tuple(tokens) for tokens in first}) == len(first)  # control


def test_without_matching_labels_stay(corpus, tiny_lm, tiny_encoder, tmp_path) -> None:
    curate(make_recipe(corpus, tiny_lm, tiny_encoder, matching="none"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "ccm.json").read_text())["permutation"] == [[0, 1, 2], [0, 1, 2]]


@pytest.fixture(scope="module")
def ablations(tiny_lm, tiny_encoder, topic_text, tmp_path_factory) -> Callable[..., Path]:
    """Curate one corpus with some settings, once for each choice of them."""
    folder = tmp_path_factory.mktemp("ablations")
    lines = [
        json.dumps({"text": topic_text(domain, seed, 40 + seed), "meta": {"source": domain}})
        for seed in range(30)
        for domain in DOMAINS
    ]
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.jsonl").write_text("\n".join(lines))

    def run(**data: object) -> Path:
        out = folder / ("-".join(f"{key}-{value}" for key, value in data.items()) or "paper")
        if not out.is_dir():
            curate(make_recipe(folder / "corpus", tiny_lm, tiny_encoder, iterations=5, **data), out)
        return out

    return run


def read_ccm(out: Path) -> dict[str, Any]:
    return json.loads((out / "ccm.json").read_text())


def test_without_kmeans(ablations) -> None:
    """Folds of the same sizes that do not know the topics; distances and order are computed as ever."""
    paper, plain = (
        json.loads((ablations(**d) / "summary.json").read_text()) for d in ({}, {"clustering": "random"})
    )
    assert np.ptp(plain["documents_per_cluster"], axis=1).max() <= 1
    assert np.ptp(paper["documents_per_cluster"], axis=1).min() > 1  # k-means makes unequal ones
    assert plain["table"] != paper["table"]
    ccm = read_ccm(ablations(clustering="random"))
    assert (ccm["clustering"], read_ccm(ablations())["clustering"]) == ("random", "kmeans")
    assert ccm["order"] == sorted(range(1, 5), key=lambda number: ccm["d_ds"][number - 1])
    assert np.shape(ccm["f1"]) == np.shape(ccm["f2"]) == np.shape(ccm["f3"]) == (4, K)


@pytest.mark.parametrize("order", ["random", "descending"])
def test_order_of_sets(ablations, order: str) -> None:
    """Everything but the order is as in the paper's run: clusters, tokens, distances, the experts' sets."""
    paper, other = ablations(), ablations(order=order)
    assert (before := read_ccm(paper))["order"] != (after := read_ccm(other))["order"]
    assert {**before, "order": 0, "ordering": 0} == {**after, "order": 0, "ordering": 0}
    assert sorted(after["order"]) == [1, 2, 3, 4]
    moe = CurriculumDataset(other / "moe")
    moe.check_all()
    assert moe.header.order == after["order"]
    old, new = checksums(paper), checksums(other)
    assert {name for name in old if old[name] != new[name]} == {
        "ccm.json",
        *(f"moe.ccm.{end}" for end in ("json", "docs.npy", "samples.npy")),
    }


def test_random_batches(ablations) -> None:
    """The same sequences in the same sets; only their order within a set differs."""
    paper, other = (CurriculumDataset(ablations(**d) / "moe") for d in ({}, {"batches": "random"}))
    other.check_all()
    assert (other.header.batches, other.header.rotate) == ("random", False)
    assert other.header.order == paper.header.order
    ends = [*other.header.iteration_start_samples[1:], len(other)]
    for start, end in zip(other.header.iteration_start_samples, ends, strict=True):
        content = [
            sorted((int(d[i]["domain"]), d[i]["tokens"].tolist()) for i in range(start, end))
            for d in (paper, other)
        ]
        assert content[0] == content[1]
    domains = np.array([int(other[i]["domain"]) for i in range(len(other))]).reshape(-1, K * P)
    assert (np.sort(domains, axis=1) != np.repeat(np.arange(K), P)).any()


def test_budgets_are_whole_batches(corpus, tiny_lm, tiny_encoder) -> None:
    budgets, replay = plan_budgets(
        make_recipe(corpus, tiny_lm, tiny_encoder, tokens_per_expert=9 * S, tokens_per_set=K * P * S * 2 + 1)
    )
    assert [budget.sequences for budget in budgets] == [
        8,
        4,
        4,
    ]  # 9 sequences are 2 batches of 4; 2 batches of p = 2
    assert [budget.tokens for budget in budgets] == [8 * S + 1, 4 * S + 1, 4 * S + 1]
    assert replay == 0


def test_more_replay_than_there_is(corpus, tiny_lm, tiny_encoder) -> None:
    with pytest.raises(
        L0MoEError, match=r"\(960\) is more than D\^\(0\) holds; set it to at most .* \(384\)"
    ):
        plan_budgets(make_recipe(corpus, tiny_lm, tiny_encoder, include_initial_tokens=10 * K * P * S))


def test_too_few_documents_for_the_clusters(tmp_path, write_lines, tiny_lm, tiny_encoder) -> None:
    """Long documents hold enough tokens, but one iteration draws fewer of them than there are clusters."""
    write_lines(tmp_path / "corpus" / "a.jsonl", [{"text": f"{i} " + "sail wind " * 3000} for i in range(9)])
    with pytest.raises(L0MoEError, match=r"2 document\(s\) cannot make model\.num_experts = 3 clusters"):
        curate(make_recipe(tmp_path / "corpus", tiny_lm, tiny_encoder), tmp_path / "out")


def test_a_corpus_that_is_too_small(tmp_path, corpus, tiny_lm, tiny_encoder) -> None:
    with pytest.raises(L0MoEError, match=r"The corpus has about \d+ tokens .* need \d+; add text or lower"):
        curate(make_recipe(corpus, tiny_lm, tiny_encoder, tokens_per_expert=10**6), tmp_path / "out")

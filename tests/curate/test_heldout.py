"""The held-out split: whole documents per domain, chosen by place and seed, packed like training text."""

import json
from pathlib import Path

import numpy as np
import pytest
from curated import scan_corpus

from megatron_l0moe.curate.corpus.catalog import Catalog
from megatron_l0moe.curate.heldout import HeldOut, hold_out, write_heldout
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.index.tokens import CorpusTokenizer


def text(domain: str, i: int) -> str:
    return f"{domain} number {i} " + "abc " * (i % 5 + 2)


@pytest.fixture
def catalog(tmp_path: Path, write_lines) -> Catalog:
    records = [{"text": text(d, i), "meta": {"source": d}} for i in range(30) for d in ("web", "code")]
    write_lines(tmp_path / "corpus" / "a.jsonl", records)
    return scan_corpus(tmp_path / "corpus")


def split(catalog: Catalog, tiny_lm: Path, seed: int = 0, tokens: int = 45, seq_length: int = 20) -> HeldOut:
    tokenizer = CorpusTokenizer.load(tiny_lm)
    return hold_out(catalog, tokenizer, tokens_per_domain=tokens, seq_length=seq_length, seed=seed)


def test_sequences_are_the_packed_documents(catalog, tiny_lm) -> None:
    tokenizer = CorpusTokenizer.load(tiny_lm)
    heldout = split(catalog, tiny_lm)
    for domain, name in enumerate(catalog.domains):
        ids = [int(i) for i in heldout.ids if catalog.rows["domain"][i] == domain]
        documents = [tokenizer.encode([text(name, i // 2)], [999])[0] for i in ids]
        stream = np.concatenate(documents)
        assert len(stream) >= 41 > len(stream) - len(documents[-1])  # no document more than needed
        found = [s for s in heldout.sequences if s.domain == domain]
        assert [s.tokens.tolist() for s in found] == [stream[:21].tolist(), stream[20:41].tolist()]
        assert found[0].first_document == ids[0]
        ends = np.cumsum([len(d) for d in documents])
        assert found[1].first_document == ids[int(np.argmax(ends > 20))]


def test_choice_depends_on_the_seed_and_is_repeatable(catalog, tiny_lm) -> None:
    first, again, other = (split(catalog, tiny_lm, seed).ids.tolist() for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_first_guess_too_short_reads_more(catalog, tiny_lm, monkeypatch) -> None:
    expected = split(catalog, tiny_lm).ids.tolist()
    monkeypatch.setattr("megatron_l0moe.curate.heldout.EXPECTED_CHARS_PER_TOKEN", 0.01)
    assert split(catalog, tiny_lm).ids.tolist() == expected


def test_density_predicts_tokens(catalog, tiny_lm) -> None:
    heldout = split(catalog, tiny_lm, tokens=200)
    tokenizer = CorpusTokenizer.load(tiny_lm)
    for domain, name in enumerate(catalog.domains):
        tokens = sum(len(tokenizer.encode([text(name, i)], [999])[0]) for i in range(30))
        chars = sum(len(text(name, i)) for i in range(30))
        assert heldout.tokens_per_char[domain] == pytest.approx(tokens / chars, rel=0.15)


def test_write(tmp_path: Path, catalog, tiny_lm) -> None:
    heldout = split(catalog, tiny_lm)
    write_heldout(tmp_path / "heldout.jsonl", heldout.sequences, [3, 1, 0, 2], catalog.domains)
    lines = [json.loads(line) for line in (tmp_path / "heldout.jsonl").read_text().splitlines()]
    assert [(line["domain"], line["cluster"], len(line["tokens"])) for line in lines] == [
        ("code", 3, 21),
        ("code", 1, 21),
        ("web", 0, 21),
        ("web", 2, 21),
    ]


def test_domain_with_too_little_text(catalog, tiny_lm) -> None:
    with pytest.raises(
        L0MoEError, match=r"Source domain 'code' has only \d+ tokens in 30 documents, but 5001 must be"
    ):
        split(catalog, tiny_lm, tokens=5000)


def test_domain_with_no_text_left_for_training(tmp_path, write_lines, tiny_lm) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "abc " * 100, "meta": {"source": "one"}}])
    with pytest.raises(L0MoEError, match=r"'one' takes all of its 1 documents and leaves none for training"):
        split(scan_corpus(tmp_path), tiny_lm)


def test_budget_below_one_sequence(catalog, tiny_lm) -> None:
    with pytest.raises(
        L0MoEError, match=r"heldout_tokens_per_domain \(19\) is less than one sequence; .* \(20\)"
    ):
        split(catalog, tiny_lm, tokens=19)

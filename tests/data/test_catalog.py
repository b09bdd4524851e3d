"""The catalog: places, domains and lengths of distinct documents, and reading them again."""

from pathlib import Path

import numpy as np
import pytest

from megatron_l0moe.data.catalog import read_documents, scan_corpus
from megatron_l0moe.errors import L0MoEError


@pytest.fixture
def corpus(tmp_path: Path, write_lines) -> Path:
    folder = tmp_path / "corpus"
    write_lines(folder / "b.jsonl", [{"text": "four", "meta": {"source": "zoo"}}, {"text": "six ch"}])
    write_lines(folder / "a.jsonl.zst", [{"text": "abc", "meta": {"source": "ant"}}, {"text": "four"}])
    return folder


def test_scan(corpus: Path) -> None:
    catalog = scan_corpus(corpus)
    assert catalog.shards == ["a.jsonl.zst", "b.jsonl"]
    assert catalog.domains == ["ant", "unknown", "zoo"]
    assert catalog.duplicates == 1  # the second "four", in b.jsonl
    assert catalog.column("shard").tolist() == [0, 0, 1]
    assert catalog.column("line").tolist() == [1, 2, 2]
    assert [catalog.domains[d] for d in catalog.column("domain")] == ["ant", "unknown", "unknown"]
    assert catalog.column("chars").tolist() == [3, 4, 6]


def test_read_documents_in_corpus_order(corpus: Path) -> None:
    catalog = scan_corpus(corpus)
    assert [(i, d.text) for i, d in read_documents(catalog, np.array([2, 0]))] == [(0, "abc"), (2, "six ch")]


def test_a_corpus_that_changes_is_refused(corpus: Path) -> None:
    catalog = scan_corpus(corpus)
    (corpus / "b.jsonl").write_text("")
    with pytest.raises(L0MoEError, match=r"Shard b\.jsonl of .* changed while it was read"):
        list(read_documents(catalog, np.array([2])))


def test_random_keys_depend_on_place_and_seed_only(corpus: Path, write_lines) -> None:
    before = scan_corpus(corpus).random_keys(1)
    assert not np.array_equal(before, scan_corpus(corpus).random_keys(2))
    write_lines(corpus / "c.jsonl", [{"text": "more"}])
    after = scan_corpus(corpus).random_keys(1)
    assert np.array_equal(before, after[:3])
    assert len(set(after.tolist())) == 4


def test_no_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(L0MoEError, match=r"has 1 shard\(s\) but no document"):
        scan_corpus(tmp_path)


def test_a_source_per_document_is_refused(tmp_path: Path, write_lines, monkeypatch) -> None:
    monkeypatch.setattr("megatron_l0moe.data.catalog.MAX_DOMAINS", 5)
    write_lines(tmp_path / "a.jsonl", [{"text": f"t{i}", "meta": {"source": f"s{i}"}} for i in range(6)])
    with pytest.raises(L0MoEError, match=r"more than 5 source domains at document a\.jsonl:6"):
        scan_corpus(tmp_path)

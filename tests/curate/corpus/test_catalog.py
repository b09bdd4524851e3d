"""The catalog: places, domains and lengths of distinct documents, what is left out, and reading them again.

Which documents are dropped, and the reason that is counted.
"""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from curated import scan_corpus
from datatrove.data import Document

from megatron_l0moe.curate.corpus import catalog as catalog_module
from megatron_l0moe.curate.corpus.catalog import DocumentFilter, read_documents
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.sections import FilterSection, SignalRange


@pytest.fixture
def corpus(tmp_path: Path, write_lines) -> Path:
    folder = tmp_path / "corpus"
    write_lines(folder / "b.jsonl", [{"text": "four", "meta": {"source": "zoo"}}, {"text": "six ch"}])
    write_lines(folder / "a.jsonl.zst", [{"text": "abc", "meta": {"source": "ant"}}, {"text": "four"}])
    return folder


@pytest.mark.parametrize("block", [1, 2, 100])
def test_scan(corpus: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(catalog_module, "BLOCK_ROWS", block)
    catalog = scan_corpus(corpus)
    assert catalog.corpus.shards == ["a.jsonl.zst", "b.jsonl"]
    assert catalog.domains == ["ant", "unknown", "zoo"]
    assert catalog.dropped == {"exact repetition": 1}  # the second "four", in b.jsonl
    assert catalog.column("shard").tolist() == [0, 0, 1]
    assert catalog.column("line").tolist() == [1, 2, 2]
    assert [catalog.domains[d] for d in catalog.column("domain")] == ["ant", "unknown", "unknown"]
    assert catalog.column("chars").tolist() == [3, 4, 6]


def test_filters(corpus: Path, write_lines) -> None:
    write_lines(corpus / "c.jsonl", [{"text": " "}, {"text": "----"}])
    catalog = scan_corpus(corpus, filters=FilterSection(min_chars=4, drop_duplicates=False))
    assert catalog.column("chars").tolist() == [4, 4, 6]
    assert catalog.dropped == {
        "exact repetition": 0, "shorter than filters.min_chars": 1, "empty text": 1, "one repeated character": 1,
    }  # fmt: skip


def test_read_documents_in_corpus_order(corpus: Path) -> None:
    catalog = scan_corpus(corpus)
    assert [(i, d.text) for i, d in read_documents(catalog, np.array([2, 0]))] == [(0, "abc"), (2, "six ch")]


@pytest.mark.parametrize(
    "lines", [[], ["{", "}"], ['{"text": "x"}', '{"text": "longer"}'], ['{"text": "x"}'] * 3]
)
def test_a_corpus_that_changes_is_refused(corpus: Path, write_lines, lines: list[str]) -> None:
    catalog = scan_corpus(corpus)
    write_lines(corpus / "b.jsonl", lines)
    with pytest.raises(L0MoEError, match=r"Shard b\.jsonl of .* changed while it was read"):
        list(read_documents(catalog, np.array([2])))


def test_a_few_bad_lines_are_set_aside(tmp_path: Path, write_lines) -> None:
    corpus, quarantine = tmp_path / "corpus", tmp_path / "q" / "quarantine.jsonl"
    write_lines(corpus / "a.jsonl", [*({"text": f"text {i}"} for i in range(8)), "broken", {"text": 3}])
    catalog = scan_corpus(corpus, max_quarantined=0.2, quarantine_file=quarantine)
    assert len(catalog) == 8
    assert catalog.dropped == {"exact repetition": 0, "not JSON": 1, "no text": 1}
    entries = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [(entry["line"], entry["reason"]) for entry in entries] == [(9, "not JSON"), (10, "no text")]
    message = (
        r"2 of 10 document\(s\) of corpus .* cannot be used \(1 not JSON, 1 no text\): line 9 of a\.jsonl is not valid "
        r"JSON \(.*\); see .*quarantine\.jsonl, repair .* raising data\.max_quarantined \(0\.19\)\."
    )
    with pytest.raises(L0MoEError, match=message):
        scan_corpus(corpus, max_quarantined=0.19, quarantine_file=quarantine)
    write_lines(corpus / "a.jsonl", [{"text": "good"}])
    scan_corpus(corpus, quarantine_file=quarantine)
    assert not quarantine.exists()  # the list of an earlier run does not stay


def test_broken_shards(tmp_path: Path, write_lines) -> None:
    for name in "abcd":
        path = write_lines(tmp_path / f"{name}.jsonl.zst", [{"text": f"{name} text"}])
    path.write_bytes(path.read_bytes()[:-3])
    quarantine = tmp_path / "quarantine.jsonl.out"
    with pytest.raises(
        L0MoEError,
        match=r"1 of 4 shard\(s\) .* to the end \(shard d\.jsonl\.zst ends inside a zstd frame.*raising",
    ):
        scan_corpus(tmp_path, max_quarantined=0.2, quarantine_file=quarantine)
    assert json.loads(quarantine.read_text())["reason"] == "broken shard"
    catalog = scan_corpus(tmp_path, max_quarantined=0.25)
    assert set(catalog.column("shard").tolist()) >= {0, 1, 2}


def test_random_keys_depend_on_place_and_seed_only(corpus: Path, write_lines) -> None:
    before = scan_corpus(corpus).random_keys(1)
    assert not np.array_equal(before, scan_corpus(corpus).random_keys(2))
    write_lines(corpus / "c.jsonl", [{"text": "more"}])
    after = scan_corpus(corpus).random_keys(1)
    assert np.array_equal(before, after[:3])
    assert len(set(after.tolist())) == 4


def test_no_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(L0MoEError, match=r"has 1 shard\(s\) but no document; add text"):
        scan_corpus(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "short"}\n')
    with pytest.raises(
        L0MoEError, match=r"no document that is used \(left out: 1 shorter than .*loosen data\.filters"
    ):
        scan_corpus(tmp_path, filters=FilterSection(min_chars=10))


def test_a_source_per_document_is_refused(tmp_path: Path, write_lines, monkeypatch) -> None:
    monkeypatch.setattr("megatron_l0moe.curate.corpus.catalog.MAX_DOMAINS", 5)
    write_lines(tmp_path / "a.jsonl", [{"text": f"t{i}", "meta": {"source": f"s{i}"}} for i in range(6)])
    with pytest.raises(L0MoEError, match=r"more than 5 source domains at document a\.jsonl:6"):
        scan_corpus(tmp_path)


def test_memory_grows_by_a_row_for_each_document(tmp_path: Path, write_lines, monkeypatch) -> None:
    """Eight times the text: the growth is that of the rows, not that of the text."""
    monkeypatch.setattr(catalog_module, "BLOCK_ROWS", 256)
    monkeypatch.setattr("megatron_l0moe.curate.corpus.lines.CHUNK_BYTES", 1 << 14)
    peaks = []
    counts = (500, 4000)
    for count in counts:
        folder = tmp_path / str(count)
        write_lines(folder / "a.jsonl", [{"text": f"{i} " * 500} for i in range(count)])
        tracemalloc.start()
        assert len(scan_corpus(folder)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    grown = (peaks[1] - peaks[0]) / (counts[1] - counts[0])
    assert grown < 4 * catalog_module.ROW.itemsize, f"{grown} bytes for each document of about 2400"


SIGNAL = "rps_doc_word_count"


def reason(text: str = "some text", filters: dict[str, Any] | None = None, **metadata: Any) -> str | None:
    doc = Document(text=text, id="a.jsonl:1", metadata={"language": "en", **metadata})
    rules = DocumentFilter(FilterSection(**(filters or {})))
    verdict = rules.filter(doc)
    found = rules.reason(doc)
    assert verdict == (True if found is None else (False, found))  # as datatrove's pipelines ask
    return found


@pytest.mark.parametrize("text", ["", " \n\t", "\u00a0\u3000"])
def test_empty_text(text: str) -> None:
    assert reason(text) == "empty text"


@pytest.mark.parametrize("text", ["a", "====", "\u00e9" * 1000])
def test_one_repeated_character(text: str) -> None:
    assert reason(text) == "one repeated character"
    assert reason(text + "b") is None


def test_length_and_language() -> None:
    assert reason("123456", {"min_chars": 7}) == "shorter than filters.min_chars"
    assert reason("1234567", {"min_chars": 7}) is None
    assert reason(filters={"languages": ["de", "fr"]}) == "language not in filters.languages"
    assert reason(filters={"languages": ["de", "en"]}) is None
    assert reason(filters={"languages": ["en"]}, language="") == "language not in filters.languages"


def test_listed_duplicates() -> None:
    assert reason(listed_duplicate=True) == "listed in the duplicates file"
    assert reason(filters={"drop_duplicates": False}, listed_duplicate=True) is None


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([[0, 9, 50]], None),
        ([[0, 9, 49.9]], f"{SIGNAL} below its minimum"),
        ([[0, 9, 100.5]], f"{SIGNAL} above its maximum"),
        ([[0, 9, None]], f"{SIGNAL} has no value"),
        ([[0, 9, float("nan")]], f"{SIGNAL} has no value"),
        ([[0, 9, 10**400]], f"{SIGNAL} above its maximum"),
        ([], f"{SIGNAL} has no value"),
    ],
)
def test_signals(spans: list[Any], expected: str | None) -> None:
    filters = {"quality_signals": {SIGNAL: SignalRange(min=50.0, max=100.0)}}
    assert reason(filters=filters, signals={SIGNAL: spans}) == expected
    assert reason(filters=filters, signals=None) == "no quality signals"
    assert reason(signals={SIGNAL: spans}) is None  # no filter, no drop


def test_signals_that_cannot_be_used() -> None:
    filters = {"quality_signals": {SIGNAL: SignalRange(min=1.0)}}
    with pytest.raises(
        L0MoEError, match=r"document a\.jsonl:1 has no signal 'rps_doc_word_count'; it has other"
    ):
        reason(filters=filters, signals={"other": []})
    with pytest.raises(L0MoEError, match=r"rates parts of document a\.jsonl:1"):
        reason(filters=filters, signals={SIGNAL: [[0, 4, 1.0], [4, 9, 0.0]]})

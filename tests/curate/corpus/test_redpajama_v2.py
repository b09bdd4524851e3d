"""RedPajama v2 in the layout of the public release: documents, signals and duplicates joined by id."""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curated import scan_corpus
from datatrove.io import get_datafolder

from megatron_l0moe.curate.corpus.catalog import read_documents
from megatron_l0moe.curate.corpus.redpajama_v2 import RedPajamaV2Reader, row_of
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.sections import FilterSection, SignalRange

TAG = "2023-06/0000/en_head"
DOCUMENTS = f"documents/{TAG}.json.gz"
WORDS = "rps_doc_word_count"


def write_gz(path: Path, records: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(b"".join(json.dumps(record).encode() + b"\n" for record in records)))


def signals_of(row: int, tag: str = TAG, **signals: Any) -> dict[str, Any]:
    return {
        "id": f"{tag}.json.gz/{row}",
        "id_int": row * 7919,
        "metadata": {"cc_net_source": f"{tag}.json.gz", "language": "en", "snapshot_id": "2023-06"},
        "quality_signals": {WORDS: [[0, 100, float(row * 10)]], "ccnet_perplexity": [[0, 100, 300.5]], **signals},
    }  # fmt: skip


def write_corpus(folder: Path, rows: int = 6, tag: str = TAG, rated: Iterable[int] | None = None) -> Path:
    documents = [
        {"url": "http://x", "digest": f"sha1:{i}", "raw_content": f"{tag} page {i}", "language": "en",
         "language_score": 0.9, "perplexity": 300.5, "bucket": "head"}
        for i in range(rows)
    ]  # fmt: skip
    write_gz(folder / f"documents/{tag}.json.gz", documents)
    rated = range(rows) if rated is None else rated
    write_gz(folder / f"quality_signals/{tag}.signals.json.gz", [signals_of(row, tag) for row in rated])
    return folder


def write_duplicates(folder: Path, ids: list[str], tag: str = TAG) -> None:
    path = folder / f"duplicates/{tag}.duplicates.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"shard_id": [f"{tag}.json.gz"] * len(ids), "doc_id": ids, "digest": ["sha1:x"] * len(ids)}
    pq.write_table(pa.table(columns), path)


def read(folder: Path) -> tuple[list[Any], RedPajamaV2Reader]:
    reader = RedPajamaV2Reader(get_datafolder(str(folder)))
    return list(reader.read_rows(DOCUMENTS)), reader


def word_counts(documents: list[Any]) -> list[float | None]:
    signals = [d.metadata["signals"] for d in documents]
    return [None if s is None else s[WORDS][0][2] for s in signals]


def test_join(tmp_path: Path) -> None:
    write_duplicates(write_corpus(tmp_path), [f"{TAG}.json.gz/{row}" for row in (1, 4)])
    documents, reader = read(tmp_path)
    assert [d.text for d in documents] == [f"{TAG} page {i}" for i in range(6)]
    assert [d.metadata["domain"] for d in documents] == ["en"] * 6
    assert word_counts(documents) == [0, 10, 20, 30, 40, 50]
    assert [d.metadata["listed_duplicate"] for d in documents] == [False, True, False, False, True, False]
    assert not reader.quarantine.side_reasons


def test_documents_without_signals(tmp_path: Path) -> None:
    """Missing rows do not shift the others."""
    documents, _ = read(write_corpus(tmp_path, rated=(1, 4)))
    assert word_counts(documents) == [None, 10, None, None, 40, None]
    (tmp_path / f"quality_signals/{TAG}.signals.json.gz").unlink()
    assert word_counts(read(tmp_path)[0]) == [None] * 6


def test_a_bad_document_does_not_shift_the_signals(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    path = tmp_path / DOCUMENTS
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    path.write_bytes(gzip.compress(b"".join([*lines[:2], b"broken\n", *lines[3:]])))
    documents, reader = read(tmp_path)
    assert word_counts(documents) == [0, 10, 30, 40, 50]
    assert reader.quarantine.reasons == {"not JSON": 1}


def test_bad_signals(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    other = "2023-06/0001/en_head"
    records = [
        signals_of(0),
        signals_of(0),
        signals_of(2),
        signals_of(1),
        signals_of(3, other),
        {"id": 4},
        signals_of(5),
    ]
    write_gz(tmp_path / f"quality_signals/{TAG}.signals.json.gz", records)
    documents, reader = read(tmp_path)
    assert word_counts(documents) == [0, None, 20, None, None, 50]
    assert reader.quarantine.side_reasons == {
        "duplicate id": 1, "id out of order": 1, "id of another shard": 1, "bad signals": 1,
    }  # fmt: skip


def test_broken_side_files(tmp_path: Path) -> None:
    write_duplicates(write_corpus(tmp_path, rows=2000), [f"{TAG}.json.gz/1"])
    for name in (f"quality_signals/{TAG}.signals.json.gz", f"duplicates/{TAG}.duplicates.parquet"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-30])
    documents, reader = read(tmp_path)
    assert len(documents) == 2000
    assert set(reader.quarantine.broken_shards) == {
        f"quality_signals/{TAG}.signals.json.gz", f"duplicates/{TAG}.duplicates.parquet",
    }  # fmt: skip


def test_scan_with_filters(tmp_path: Path) -> None:
    write_duplicates(write_corpus(tmp_path, rows=8), [f"{TAG}.json.gz/3"])
    write_corpus(tmp_path, rows=2, tag="2023-06/0000/de_tail", rated=())
    filters = FilterSection(quality_signals={WORDS: SignalRange(min=20.0, max=60.0)})
    catalog = scan_corpus(tmp_path, filters=filters)
    assert catalog.corpus.format == "redpajama_v2"
    assert catalog.domains == ["en"]
    assert catalog.column("line").tolist() == [3, 5, 6, 7]
    assert catalog.dropped == {
        "exact repetition": 0,
        "no quality signals": 2,
        "listed in the duplicates file": 1,
        f"{WORDS} below its minimum": 2,
        f"{WORDS} above its maximum": 1,
    }
    assert [d.text for _, d in read_documents(catalog, np.arange(4))] == [
        f"{TAG} page {i}" for i in (2, 4, 5, 6)
    ]


def test_unfiltered_scan_does_not_open_signals(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    (tmp_path / f"quality_signals/{TAG}.signals.json.gz").write_bytes(b"\x00 no gzip")
    assert len(scan_corpus(tmp_path)) == 6
    with pytest.raises(L0MoEError, match=r"1 of 1 shard\(s\) .* cannot be read to the end"):
        scan_corpus(tmp_path, filters=FilterSection(quality_signals={WORDS: SignalRange()}))


def test_row_of() -> None:
    assert row_of(f"{TAG}.json.gz/12", TAG) == 12
    for wrong in (
        f"{TAG}.json.gz/",
        f"{TAG}.json.gz/-1",
        f"{TAG}.json.gz/1\u0661",
        f"{TAG}/1",
        12,
        None,
        "9" * 10_000,
    ):
        assert row_of(wrong, TAG) is None

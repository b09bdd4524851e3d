"""Parquet shards: columns, row groups, and damaged files."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datatrove.io import get_datafolder

from megatron_l0moe.curate.corpus.readers import ParquetRowsReader
from megatron_l0moe.errors import L0MoEError


def write(path: Path, columns: dict[str, Any], rows_of_a_group: int = 2) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=rows_of_a_group)
    return path


def read(path: Path, wanted: set[int] | None = None) -> tuple[list[Any], ParquetRowsReader]:
    reader = ParquetRowsReader(get_datafolder(str(path.parent)))
    return list(reader.read_rows(path.name, wanted)), reader


def test_rows(tmp_path: Path) -> None:
    metas = [{"source": "arxiv/1", "language": "en"}] * 2 + [None] * 3
    columns = {
        "text": [f"text {i}" for i in range(5)],
        "meta": metas,
        "source": [*"abc", "d/e", None],
        "n": [0] * 5,
    }
    documents, _ = read(write(tmp_path / "a.parquet", columns))
    assert [d.id for d in documents] == [f"a.parquet:{i}" for i in range(1, 6)]
    assert [d.text for d in documents] == columns["text"]
    assert [d.metadata["domain"] for d in documents] == ["arxiv", "arxiv", "c", "d", "unknown"]
    assert [d.metadata["language"] for d in documents] == ["en", "en", "", "", ""]


@pytest.mark.parametrize(
    "texts",
    [
        pa.array(["x", "y"], pa.large_string()),
        pa.array(["x", "y"]).dictionary_encode(),
        pa.array(["x", "y"], pa.string_view()),
    ],
    ids=lambda texts: str(texts.type).partition("<")[0],
)
def test_kinds_of_text(tmp_path: Path, texts: pa.Array) -> None:
    metas = ['{"source": "wiki"}', "{broken"]
    documents, _ = read(write(tmp_path / "a.parquet", {"text": texts, "meta": metas}))
    assert [(d.text, d.metadata["domain"]) for d in documents] == [("x", "wiki"), ("y", "unknown")]


def test_only_groups_with_wanted_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", {"text": [f"text {i}" for i in range(1, 11)]}, rows_of_a_group=3)
    groups = []
    original = ParquetRowsReader._group

    def spy(self: ParquetRowsReader, table: Any, group: int, *rest: Any) -> Any:
        groups.append(group)
        return original(self, table, group, *rest)

    monkeypatch.setattr(ParquetRowsReader, "_group", spy)
    documents, _ = read(path, {3, 4, 10})
    assert [(d.metadata["line"], d.text) for d in documents] == [
        (3, "text 3"),
        (4, "text 4"),
        (10, "text 10"),
    ]
    assert groups == [0, 1, 3]


def test_bad_rows(tmp_path: Path) -> None:
    """Parquet files with bytes that are no UTF-8 exist: not every writer checks."""
    raw = pa.array([b"good", b"\xff\xfe", None, b"a\x00b"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    languages = pa.Array.from_buffers(
        pa.string(), 4, pa.array([b"\xff", b"en", b"en", b"en"], pa.binary()).buffers()
    )
    documents, reader = read(write(tmp_path / "a.parquet", {"text": texts, "language": languages}))
    assert [(d.text, d.metadata["language"]) for d in documents] == [("good", "")]
    assert reader.quarantine.reasons == {"invalid UTF-8": 1, "no text": 1, "NUL character": 1}


@pytest.mark.parametrize("cut", [1, 100, 300])
def test_damaged(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "a.parquet", {"text": [f"text {i}" for i in range(100)]})
    path.write_bytes(path.read_bytes()[:-cut])
    documents, reader = read(path)
    assert documents == []
    assert "is not valid Parquet data" in reader.quarantine.broken_shards["a.parquet"]


def test_other_columns(tmp_path: Path) -> None:
    with pytest.raises(L0MoEError, match=r"a\.parquet has no column `text` or .* but body; rename"):
        read(write(tmp_path / "a.parquet", {"body": ["x"]}))
    with pytest.raises(L0MoEError, match=r"Column `text` of Parquet shard b\.parquet has type int64"):
        read(write(tmp_path / "b.parquet", {"text": [1]}))

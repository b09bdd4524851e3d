"""Single shards of JSON lines and plain text: what comes out, and what is set aside and why."""

import json
from pathlib import Path
from typing import Any

import pytest
from datatrove.io import get_datafolder

from megatron_l0moe.curate.corpus.readers import JsonLinesReader, ShardReader, TextReader

GOOD = {"text": "hello", "meta": {"source": "web"}}


def read(
    reader: type[ShardReader], path: Path, wanted: set[int] | None = None
) -> tuple[list[Any], ShardReader]:
    instance = reader(get_datafolder(str(path.parent)))
    return list(instance.read_rows(path.name, wanted)), instance


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst"])
def test_json_lines(tmp_path: Path, write_lines, name: str) -> None:
    github = {"source": "github", "language": [{"name": "C"}]}
    records = [
        {"text": "hello", "meta": {"source": "cc/2019-30/x", "language": "en"}},
        {"text": "a\nb \u00e9", "meta": github},
        {"text": "", "language": "de"},
    ]
    documents, reader = read(JsonLinesReader, write_lines(tmp_path / name, records))
    assert [d.text for d in documents] == ["hello", "a\nb \u00e9", ""]
    assert [d.id for d in documents] == [f"{name}:1", f"{name}:2", f"{name}:3"]
    assert [d.metadata["domain"] for d in documents] == ["cc", "github", "unknown"]
    assert [d.metadata["language"] for d in documents] == ["en", "", "de"]
    assert reader.quarantine.reasons.total() == 0


def test_ids_in_the_data_do_not_matter(tmp_path: Path, write_lines) -> None:
    """A document is named by its place, so two with the same id are two documents."""
    records = [{"id": "7", "text": "one"}, {"id": "7", "text": "two"}]
    documents, _ = read(JsonLinesReader, write_lines(tmp_path / "a.jsonl", records))
    assert [(d.id, d.text) for d in documents] == [("a.jsonl:1", "one"), ("a.jsonl:2", "two")]


def test_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\n\xef\xbb\xbf{"text": "y"}\n')
    documents, reader = read(JsonLinesReader, tmp_path / "a.jsonl")
    assert [d.text for d in documents] == ["x"]
    assert reader.quarantine.reasons == {"not JSON": 1}


def test_unwanted_lines_are_not_parsed(tmp_path: Path, write_lines) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["broken", GOOD])
    documents, reader = read(JsonLinesReader, path, {2})
    assert [d.metadata["line"] for d in documents] == [2]
    assert not reader.quarantine.reasons
    assert read(JsonLinesReader, path)[1].quarantine.reasons == {"not JSON": 1}  # control


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{'text': 'x'}", "not JSON"),
        (b'{"text": "cut of', "not JSON"),
        (b'{"text": "raw \x00 NUL"}', "not JSON"),
        (b'{"text": ' + b"[" * 100_000, "not JSON"),
        (b'{"text": 1' + b"0" * 5000 + b"}", "not JSON"),
        (b'{"text": "\xff\xfe"}', "invalid UTF-8"),
        ('{"text": "x"}'.encode("utf-16-le"), "not JSON"),
        ('{"text": "x"}'.encode("utf-16"), "invalid UTF-8"),
        (b"[1, 2]", "no text"),
        (b'{"meta": {}}', "no text"),
        (b'{"text": 5}', "no text"),
        (b'{"text": null}', "no text"),
        (b'{"text": "a\\ud800b"}', "lone surrogate"),
        (b'{"text": "a\\u0000b"}', "NUL character"),
    ],
    ids=[
        "quotes", "cut", "raw NUL", "deep", "long number", "latin", "utf-16", "utf-16 mark", "list", "missing",
        "number", "null", "surrogate", "NUL",
    ],
)  # fmt: skip
def test_bad_lines_are_set_aside(tmp_path: Path, line: bytes, reason: str) -> None:
    good = json.dumps(GOOD).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, line, good]))
    documents, reader = read(JsonLinesReader, tmp_path / "a.jsonl")
    assert [d.metadata["line"] for d in documents] == [1, 3]
    assert reader.quarantine.reasons == {reason: 1}
    reader.quarantine.save(tmp_path / "quarantine.jsonl")
    (entry,) = [json.loads(text) for text in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert (entry["shard"], entry["line"], entry["reason"]) == ("a.jsonl", 2, reason)
    assert entry["head"] == line[:200].decode("utf-8", errors="backslashreplace")


def test_a_line_that_is_too_long(tmp_path: Path, write_lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_l0moe.curate.corpus.lines.MAX_LINE_BYTES", 1000)
    path = write_lines(tmp_path / "a.jsonl", [GOOD, {"text": "x" * 2000}, GOOD])
    documents, reader = read(JsonLinesReader, path)
    assert [d.metadata["line"] for d in documents] == [1, 3]
    assert reader.quarantine.reasons == {"too long": 1}


def test_a_line_of_200_megabytes(tmp_path: Path) -> None:
    """It is one document like any other."""
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "')
        for _ in range(200):
            file.write(b"0123456789abcdef" * (1 << 16))
        file.write(b'"}\n{"text": "next"}\n')
    documents, reader = read(JsonLinesReader, tmp_path / "a.jsonl")
    assert [len(d.text) for d in documents] == [200 << 20, 4]
    assert not reader.quarantine.reasons


def test_a_broken_shard_gives_what_comes_before(tmp_path: Path, write_lines, monkeypatch) -> None:
    monkeypatch.setattr("megatron_l0moe.curate.corpus.lines.CHUNK_BYTES", 64)
    path = write_lines(
        tmp_path / "a.jsonl.zst", [{"text": f"{i * 7919} {i * 104729}"} for i in range(20_000)]
    )
    path.write_bytes(path.read_bytes()[:-60])
    documents, reader = read(JsonLinesReader, path)
    assert 0 < len(documents) < 20_000
    assert [d.metadata["line"] for d in documents] == list(range(1, len(documents) + 1))
    (detail,) = reader.quarantine.broken_shards.values()
    assert detail == "ends inside a zstd frame, so it is truncated"


def test_a_shard_that_vanished(tmp_path: Path) -> None:
    documents, reader = read(JsonLinesReader, tmp_path / "gone.jsonl")
    assert documents == []
    assert "cannot be read" in reader.quarantine.broken_shards["gone.jsonl"]


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "a.txt").write_bytes(b"\xef\xbb\xbftwo\nlines\n")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    reader = TextReader(get_datafolder(str(tmp_path)))
    (document,) = [d for name in ("b.txt", "law/a.txt") for d in reader.read_rows(name)]
    assert (document.text, document.id, document.metadata["domain"]) == ("two\nlines\n", "law/a.txt:1", "law")
    assert reader.quarantine.reasons == {"invalid UTF-8": 1}


def test_blank_lines_and_carriage_returns(tmp_path: Path) -> None:
    """Blank lines are no documents, and those behind them keep their numbers."""
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "x"}\r\n \t\r\n\n{"text": "y"}')
    documents, reader = read(JsonLinesReader, tmp_path / "a.jsonl")
    assert [(d.text, d.metadata["line"]) for d in documents] == [("x", 2), ("y", 5)]
    assert not reader.quarantine.reasons
    (again,) = read(JsonLinesReader, tmp_path / "a.jsonl", {5})[0]
    assert again.text == "y"


def test_text_under_other_keys(tmp_path: Path, write_lines) -> None:
    records = [{"content": "a"}, {"raw_content": "b"}, {"content": "c", "text": "d"}, {"body": "e", "id": 1}]
    documents, reader = read(JsonLinesReader, write_lines(tmp_path / "a.jsonl", records))
    assert [d.text for d in documents] == ["a", "b", "d"]
    reader.quarantine.save(tmp_path / "quarantine.jsonl")
    entry = json.loads((tmp_path / "quarantine.jsonl").read_text())
    assert entry["detail"] == "has no string `text` or `content` or `raw_content`; its keys are body, id"

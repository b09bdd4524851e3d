"""Reading shards: what comes out, and one clear sentence for each kind of bad input."""

import json
from pathlib import Path

import pytest
import zstandard

from megatron_l0moe.data.corpus import domain_of, find_shards, read_shard
from megatron_l0moe.errors import L0MoEError

GOOD = {"text": "hello", "meta": {"source": "web"}}


def test_reads_plain_and_zstd_alike(tmp_path: Path, write_lines) -> None:
    records = [GOOD, {"text": "a\nb \u00e9", "meta": {}}, {"text": "no meta"}]
    plain = write_lines(tmp_path / "a.jsonl", records)
    packed = write_lines(tmp_path / "b.jsonl.zst", records)
    for path in (plain, packed):
        documents = list(read_shard(path, "s"))
        assert [d.text for d in documents] == ["hello", "a\nb \u00e9", "no meta"]
        assert [d.id for d in documents] == ["s:1", "s:2", "s:3"]
        assert [d.domain for d in documents] == ["web", "unknown", "unknown"]


def test_reads_several_frames_and_lines_across_chunks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("megatron_l0moe.data.corpus.CHUNK_BYTES", 7)
    lines = [json.dumps({"text": "x" * n, "meta": {"source": "s"}}) + "\n" for n in (1, 500, 30)]
    compress = zstandard.ZstdCompressor().compress
    whole = "".join(lines).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(compress(whole[:40]) + compress(whole[40:]))
    (tmp_path / "a.jsonl").write_bytes(whole.rstrip(b"\n"))  # a last line without newline counts
    for name in ("a.jsonl.zst", "a.jsonl"):
        assert [len(d.text) for d in read_shard(tmp_path / name, name)] == [1, 500, 30]


def test_unwanted_lines_are_not_parsed(tmp_path: Path, write_lines) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["broken", GOOD])
    assert [d.line for d in read_shard(path, "a", {2})] == [2]
    with pytest.raises(L0MoEError):
        list(read_shard(path, "a"))


def test_shards_are_sorted_by_relative_path(tmp_path: Path, write_lines) -> None:
    for name in ("b.jsonl", "a/z.jsonl.zst", "c.txt", "a.jsonl"):
        write_lines(tmp_path / name, [GOOD])
    assert [p.relative_to(tmp_path).as_posix() for p in find_shards(tmp_path)] == [
        "a.jsonl",
        "a/z.jsonl.zst",
        "b.jsonl",
    ]


@pytest.mark.parametrize(
    ("meta", "domain"),
    [
        ({"source": "github"}, "github"),
        ({"source": "cc/2019-30/en_middle_0053.json.gz/line405796"}, "cc"),
        ({"source": ""}, "unknown"),
        ({"source": 3}, "unknown"),
        ({}, "unknown"),
        ("text", "unknown"),
        (None, "unknown"),
    ],
)
def test_domain_of(meta: object, domain: str) -> None:
    assert domain_of(meta) == domain


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 'x'}", r"Line 2 of .*a\.jsonl is not valid UTF-8 JSON .* repair or delete that line"),
        ("", r"Line 2 of .*a\.jsonl is not valid UTF-8 JSON"),
        ('{"text": "cut of', r"Line 2 of .*a\.jsonl is not valid UTF-8 JSON"),
        ("[1, 2]", r"Line 2 of .*a\.jsonl has no non-empty string `text`"),
        ('{"meta": {}}', r"Line 2 of .* has no non-empty string `text`"),
        ('{"text": ""}', r"Line 2 of .* has no non-empty string `text`"),
        ('{"text": " \\n\\t"}', r"Line 2 of .* has no non-empty string `text`"),
        ('{"text": 5}', r"Line 2 of .* has no non-empty string `text`"),
        ('{"text": "a\\ud800b"}', r"Line 2 of .* has a lone surrogate in `text` at character 1"),
    ],
    ids=["quotes", "blank", "cut", "list", "missing", "empty", "space", "number", "surrogate"],
)
def test_bad_lines_are_named(tmp_path: Path, write_lines, line: str, message: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [GOOD, line, GOOD])
    with pytest.raises(L0MoEError, match=message):
        list(read_shard(path, "a"))


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff\xfe"}\n')
    with pytest.raises(L0MoEError, match=r"Line 1 of .* is not valid UTF-8 JSON"):
        list(read_shard(tmp_path / "a.jsonl", "a"))


@pytest.mark.parametrize("cut", [1, 20, 60], ids=lambda cut: f"minus{cut}")
def test_truncated_zstd_is_seen(tmp_path: Path, write_lines, cut: int) -> None:
    path = write_lines(tmp_path / "a.jsonl.zst", [{"text": f"{i * 7919} some text"} for i in range(50)])
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(L0MoEError, match=r"a\.jsonl\.zst ends inside a zstd frame.*copy or download"):
        list(read_shard(path, "a"))


def test_not_zstd(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b'{"text": "plain"}\n')
    with pytest.raises(L0MoEError, match=r"a\.jsonl\.zst is not valid zstd data"):
        list(read_shard(tmp_path / "a.jsonl.zst", "a"))


def test_missing_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(L0MoEError, match=r"Corpus folder .*nowhere does not exist; set data\.corpus"):
        find_shards(tmp_path / "nowhere")
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(L0MoEError, match=r"holds no \*\.jsonl"):
        find_shards(tmp_path)

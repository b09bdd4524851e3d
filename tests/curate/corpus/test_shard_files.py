"""Finding the shards of a corpus: formats, places, and one clear sentence for what is not there."""

import gzip
import json
import logging
import os
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from curated import scan_corpus
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from megatron_l0moe.curate.corpus.catalog import DocumentFilter, read_documents
from megatron_l0moe.curate.corpus.shard_files import Corpus, open_corpus
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.sections import FilterSection

GOOD = {"text": "hello", "meta": {"source": "web"}}


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def test_shards_are_sorted_by_relative_path(tmp_path: Path) -> None:
    touch(tmp_path, "b.jsonl", "a/z.jsonl.zst", "c.txt", "a.jsonl", "d.jsonl.gz", "SHA256SUMS")
    corpus = open_corpus(str(tmp_path))
    assert corpus.format == "jsonl"
    assert corpus.shards == ["a.jsonl", "a/z.jsonl.zst", "b.jsonl", "d.jsonl.gz"]


def test_formats(tmp_path: Path) -> None:
    touch(
        tmp_path / "v2",
        "documents/2023-06/0000/en_head.json.gz",
        "duplicates/2023-06/0000/en_head.duplicates.parquet",
    )
    touch(tmp_path / "parquet", "train/0.parquet", "readme.txt")
    touch(tmp_path / "text", "law/a.txt", "b.txt.gz")
    assert open_corpus(str(tmp_path / "v2")).format == "redpajama_v2"
    assert open_corpus(str(tmp_path / "v2"), "parquet").shards == [
        "duplicates/2023-06/0000/en_head.duplicates.parquet"
    ]
    assert open_corpus(str(tmp_path / "parquet")).shards == ["train/0.parquet"]
    assert open_corpus(str(tmp_path / "text"), "text").shards == ["b.txt.gz", "law/a.txt"]


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(L0MoEError, match=r"Corpus folder .*nowhere does not exist; set data\.corpus"):
        open_corpus(str(tmp_path / "nowhere"))
    touch(tmp_path, "a.json")
    with pytest.raises(
        L0MoEError,
        match=r"holds no shard \(documents/\*\*/\*\.json\.gz or \*\.jsonl, .*such as a\.json, are none; put",
    ):
        open_corpus(str(tmp_path))
    touch(tmp_path, "readme.txt")
    with pytest.raises(L0MoEError, match=r"set data\.corpus_format to text to read its 1 \.txt file"):
        open_corpus(str(tmp_path))
    with pytest.raises(L0MoEError, match=r"holds no shard \(\*\.parquet\)"):
        open_corpus(str(tmp_path), "parquet")
    touch(tmp_path, "a.jsonl", "b.parquet")
    with pytest.raises(
        L0MoEError, match=r"several formats \(jsonl, parquet\); choose one with data\.corpus_format"
    ):
        open_corpus(str(tmp_path))


def test_unknown_protocols(tmp_path: Path) -> None:
    with pytest.raises(
        L0MoEError, match=r"Corpus nosuch://x cannot be opened \(.*nosuch.*\); correct data\.corpus"
    ):
        open_corpus("nosuch://x")


def test_remote_corpus(write_lines, tmp_path: Path) -> None:
    """The same documents from a folder and from an fsspec file system."""
    local = tmp_path / "corpus"
    write_lines(local / "a.jsonl.zst", [GOOD, {"text": "two"}])
    write_lines(local / "sub" / "b.jsonl", [{"text": "three"}])
    memory = fsspec.filesystem("memory")
    memory.put(f"{local}/", "/readers-test/", recursive=True)
    try:
        here, there = scan_corpus(local), scan_corpus("memory://readers-test")
        assert there.corpus.shards == here.corpus.shards == ["a.jsonl.zst", "sub/b.jsonl"]
        assert there.rows.tolist() == here.rows.tolist()
        texts = [document.text for _, document in read_documents(there, np.arange(3))]
        assert texts == ["hello", "two", "three"]
        with pytest.raises(L0MoEError, match="Corpus folder memory://readers-none does not exist"):
            scan_corpus("memory://readers-none")
    finally:
        memory.rm("/readers-test", recursive=True)


def texts_of(corpus: Corpus) -> list[str]:
    reader = corpus.reader()
    texts = [document.text for shard in corpus.shards for document in reader.read_rows(shard)]
    assert not reader.quarantine.reasons
    return texts


def pack(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def test_contents_tell_shards_where_names_do_not(tmp_path: Path, caplog) -> None:
    """C4's .json.gz, parts without a suffix, and JSON lines in a .txt are shards; other JSON and notes are none."""
    caplog.set_level(logging.INFO)
    files = {
        "c4-train.00000-of-01024.json.gz": gzip.compress(pack("a" * 200_000)),
        "part-00000": pack("b"), "x/0.zst": zstandard.compress(pack("c")), "lines.txt": b"\xef\xbb\xbf" + pack("d"),
        "dataset_infos.json": b'{"features": {}}', "array.json": b'[\n{"text": "z"}\n]', "readme.md": b"{ not JSON",
        "pretty.json": b'{\n "text": "z"\n}', "_SUCCESS": b"", "a.csv": b"text\nz\n", "table.arrow": b"ARROW1" * 9,
        ".cache/x.jsonl": pack("z"), "x/.hidden.jsonl": pack("z"), "y.jsonl.tmp": pack("z"), "z.jsonl~": pack("z"),
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    corpus = open_corpus(str(tmp_path))
    assert (corpus.format, corpus.shards) == ("jsonl", sorted(list(files)[:4]))
    assert sorted(texts_of(corpus)) == ["a" * 200_000, "b", "c", "d"]
    (line,) = [line for line in caplog.messages if "are not read" in line]
    assert "11 file(s) are no shards and are not read: .cache/, _SUCCESS, a.csv, array.json, " in line


def test_a_folder_named_documents_is_not_redpajama_v2(tmp_path: Path) -> None:
    """Dolma's toolkit has one too, with attributes beside it that hold no text."""
    for name, content in {"documents/a.json.gz": pack("x"), "attributes/e/a.json.gz": b'{"id": 1}\n'}.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(gzip.compress(content))
    corpus = open_corpus(str(tmp_path))
    assert (corpus.format, corpus.shards) == ("jsonl", ["documents/a.json.gz"])


def test_damaged_files_with_unsure_names_are_not_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(pack("x"))[:15])
    (tmp_path / "b.json.gz").write_bytes(b"\x00\xff" * 20)
    corpus = open_corpus(str(tmp_path))
    assert corpus.shards == ["a.json.gz", "b.json.gz"]
    reader = corpus.reader()
    assert not [document for shard in corpus.shards for document in reader.read_rows(shard)]
    assert sorted(reader.quarantine.broken_shards) == corpus.shards


def test_linked_folders(tmp_path: Path, write_lines, caplog) -> None:
    """Links to files and folders are followed, spaces in names are nothing, and a loop ends."""
    far, corpus = tmp_path / "far away", tmp_path / "corpus"
    write_lines(far / "sub/a b.jsonl", [{"text": "linked twice"}])
    write_lines(far / "more/c.jsonl", [{"text": "linked"}])
    write_lines(corpus / "own/b.jsonl", [{"text": "own"}])
    (corpus / "part").symlink_to(far, target_is_directory=True)
    (corpus / "own/link.jsonl").symlink_to(far / "sub/a b.jsonl")
    (far / "more/loop").symlink_to(corpus, target_is_directory=True)
    (corpus / "own/up").symlink_to("..", target_is_directory=True)
    opened = open_corpus(str(corpus))
    assert opened.shards == ["own/b.jsonl", "own/link.jsonl", "part/more/c.jsonl", "part/sub/a b.jsonl"]
    assert sum("leads back to a folder above it" in line for line in caplog.messages) == 2
    again = Corpus.from_record(json.loads(json.dumps(opened.record())))
    assert texts_of(again) == ["own", "linked twice", "linked", "linked twice"]
    before = opened.state()
    assert before == again.state()
    os.utime(far / "more/c.jsonl", (1, 1))  # the state is that of what a link leads to
    assert [old == new for old, new in zip(before, opened.state(), strict=True)] == [True, True, False, True]
    (corpus / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(
        L0MoEError, match=r"Corpus file .*gone cannot be read \(No such file.*\); mount or copy"
    ):
        open_corpus(str(corpus))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed(tmp_path: Path, write_lines) -> None:
    write_lines(tmp_path / "a.jsonl", [GOOD])
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(L0MoEError, match=r"Corpus folder .*closed cannot be listed \(Permission denied\)"):
        open_corpus(str(tmp_path))


@pytest.mark.parametrize("name", ["a b.jsonl", "x.gz", "t.parquet"])
def test_a_single_file(tmp_path: Path, write_lines, name: str) -> None:
    write_lines(tmp_path / "other.jsonl", [GOOD])
    if name == "t.parquet":
        pq.write_table(pa.table({"text": ["x"]}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(gzip.compress(pack("x")) if name == "x.gz" else pack("x"))
    memory: Any = fsspec.filesystem("memory")
    memory.put(str(tmp_path / name), f"/single/{name}")
    try:
        for location in (str(tmp_path / name), f"memory://single/{name}"):
            corpus = open_corpus(location)
            assert corpus.shards == [name]
            assert texts_of(Corpus.from_record(corpus.record())) == ["x"]
            assert [entry[:2] for entry in corpus.state()] == [[name, str((tmp_path / name).stat().st_size)]]
    finally:
        memory.rm("/single", recursive=True)


def test_text_files_have_no_keys(tmp_path: Path) -> None:
    touch(tmp_path, "law/a.txt")
    assert open_corpus(str(tmp_path), "text", "folder").shards == ["law/a.txt"]
    with pytest.raises(L0MoEError, match=r"data\.domain_key \(meta\.x\) is a path in a record"):
        open_corpus(str(tmp_path), "text", "meta.x")


class Collect(PipelineStep):
    """Writes the ids of what arrives to a file of its task."""

    name, type = "collect", "test"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data, rank: int = 0, world_size: int = 1):
        (self.folder / f"{rank}.txt").write_text("\n".join(document.id for document in data))
        yield from ()


def test_readers_and_filters_are_datatrove_steps(write_lines, tmp_path: Path) -> None:
    for name in "abc":
        write_lines(tmp_path / "corpus" / f"{name}.jsonl", [GOOD, {"text": "too short"[:3]}, "broken"])
    (tmp_path / "ids").mkdir()
    pipeline = [
        open_corpus(str(tmp_path / "corpus")).reader(),
        DocumentFilter(FilterSection(min_chars=4)),
        Collect(tmp_path / "ids"),
    ]
    LocalPipelineExecutor(pipeline, tasks=2, logging_dir=str(tmp_path / "logs")).run()
    assert (tmp_path / "ids" / "0.txt").read_text().split() == ["a.jsonl:1", "c.jsonl:1"]
    assert (tmp_path / "ids" / "1.txt").read_text().split() == ["b.jsonl:1"]
    assert isinstance(next(open_corpus(str(tmp_path / "corpus")).reader().run()), Document)

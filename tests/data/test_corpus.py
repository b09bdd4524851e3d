"""Finding the shards of a corpus: formats, places, and one clear sentence for what is not there."""

from pathlib import Path

import fsspec
import numpy as np
import pytest
from curated import scan_corpus
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from megatron_l0moe.data.catalog import read_documents
from megatron_l0moe.data.corpus import open_corpus
from megatron_l0moe.data.filters import DocumentFilter
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe_sections import FilterSection

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
        L0MoEError, match=r"holds no shard \(documents/\*\*/\*\.json\.gz or \*\.jsonl, .*put shards there"
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

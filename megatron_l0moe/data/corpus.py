"""A corpus: the shards below a folder or fsspec URL, and the reader of their format."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from datatrove.io import DataFolder, get_datafolder

from megatron_l0moe.data.parquet_reader import ParquetRowsReader
from megatron_l0moe.data.readers import JsonLinesReader, ShardReader, TextReader
from megatron_l0moe.data.redpajama_v2 import DOCUMENTS, SUFFIX, RedPajamaV2Reader
from megatron_l0moe.errors import L0MoEError

Format = Literal["auto", "jsonl", "redpajama_v2", "parquet", "text"]
SUFFIXES = {
    "redpajama_v2": (SUFFIX,),
    "jsonl": (".jsonl", ".jsonl.zst", ".jsonl.gz"),
    "parquet": (".parquet",),
    "text": (".txt", ".txt.zst", ".txt.gz"),
}
READERS: dict[str, type[ShardReader]] = {
    "jsonl": JsonLinesReader,
    "parquet": ParquetRowsReader,
    "text": TextReader,
}
GUESSED = ("jsonl", "parquet")
"""Formats that "auto" finds beside RedPajama v2, whose tree holds Parquet files too. Text is asked for by name, since a
readme would be taken for it."""


@dataclass(frozen=True)
class Corpus:
    """Shards of one format, in the order of their names."""

    location: str
    folder: DataFolder
    format: str
    shards: list[str]
    """Paths relative to the location."""

    def record(self) -> dict[str, Any]:
        """Return everything as values that JSON has; the place is absolute."""
        return {
            "location": self.location,
            "root": self.folder.fs.unstrip_protocol(self.folder.path),
            "format": self.format,
            "shards": self.shards,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Corpus":
        """Return the corpus that ``record`` was made of, without listing its folder again."""
        folder = _ShardFolder(get_datafolder(record["root"]), record["shards"])
        return cls(record["location"], folder, record["format"], record["shards"])

    def state(self) -> list[list[str]]:
        """Return name, size and time (or version) of every shard, which differ when the corpus has changed."""
        found = self.folder.find("", detail=True)
        times = ("mtime", "ETag", "etag", "LastModified", "updated", "created")
        return [
            [
                name,
                str(found[name]["size"]),
                str(next((found[name][t] for t in times if t in found[name]), "")),
            ]
            for name in self.shards
        ]

    def reader(self, *, with_signals: bool = False, with_duplicates: bool = False) -> ShardReader:
        """Return a new reader; the arguments are for RedPajama v2: what is joined to the documents."""
        if self.format == "redpajama_v2":
            return RedPajamaV2Reader(self.folder, with_signals=with_signals, with_duplicates=with_duplicates)
        return READERS[self.format](self.folder)


class _ShardFolder(DataFolder):
    """A folder that lists the shards of a format only, which is what a datatrove executor deals out to its tasks."""

    def __init__(self, folder: DataFolder, shards: list[str]) -> None:
        super().__init__(folder.path, fs=folder.fs)
        self._shards = shards

    def list_files(self, *args: object, **kwargs: object) -> list[str]:
        """Return the shards."""
        return list(self._shards)


def open_corpus(location: str, form: Format = "auto") -> Corpus:
    """List the shards below a local folder or an fsspec URL such as s3://bucket/folder.

    Raises:
        L0MoEError: the place cannot be opened or does not exist, or holds no shard, or shards of two formats.
    """
    try:
        folder = get_datafolder(location)
        files = folder.list_files() if folder.isdir("") else None
    except (ImportError, ValueError, OSError) as error:
        raise L0MoEError(
            f"Corpus {location} cannot be opened ({' '.join(str(error).split())}); correct data.corpus, or install the "
            "fsspec package of its protocol."
        ) from error
    if files is None:
        raise L0MoEError(
            f"Corpus folder {location} does not exist; set data.corpus to a folder of shards "
            f"({_patterns('jsonl')}, {_patterns('parquet')})."
        )
    found = {name: shards for name in SUFFIXES if (shards := _shards(files, name))}
    guessed = _guess(found) if form == "auto" else [form]
    if len(guessed) > 1:
        raise L0MoEError(
            f"Corpus {location} holds shards of several formats ({', '.join(guessed)}); choose one with "
            "data.corpus_format."
        )
    if not guessed or guessed[0] not in found:
        texts = len(found.get("text", []))
        hint = f"set data.corpus_format to text to read its {texts} .txt file(s)" if texts else ""
        wanted = " or ".join(_patterns(name) for name in (guessed or ("redpajama_v2", *GUESSED)))
        raise L0MoEError(
            f"Corpus folder {location} holds no shard ({wanted}); {hint or 'put shards there or correct data.corpus'}."
        )
    shards = found[guessed[0]]
    return Corpus(location, _ShardFolder(folder, shards), guessed[0], shards)


def _guess(found: Collection[str]) -> list[str]:
    return ["redpajama_v2"] if "redpajama_v2" in found else [name for name in GUESSED if name in found]


def _shards(files: list[str], form: str) -> list[str]:
    inside = DOCUMENTS if form == "redpajama_v2" else ""
    return sorted(name for name in files if name.startswith(inside) and name.endswith(SUFFIXES[form]))


def _patterns(form: str) -> str:
    inside = f"{DOCUMENTS}**/" if form == "redpajama_v2" else ""
    return ", ".join(f"{inside}*{suffix}" for suffix in SUFFIXES[form])

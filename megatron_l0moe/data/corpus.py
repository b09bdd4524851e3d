"""A corpus: the shards below a folder or fsspec URL, or a single file, and the reader of their format."""

import os
import re
from dataclasses import dataclass
from typing import Any, Literal

from datatrove.io import DataFolder, get_datafolder

from megatron_l0moe.data.parquet_reader import RecordsReader
from megatron_l0moe.data.readers import ShardReader, TextReader
from megatron_l0moe.data.records import FOLDER
from megatron_l0moe.data.redpajama_v2 import DOCUMENTS, SUFFIX, RedPajamaV2Reader
from megatron_l0moe.data.shard_files import find_shards, is_passed_over, list_files, log_left_out
from megatron_l0moe.errors import L0MoEError

Format = Literal["auto", "jsonl", "redpajama_v2", "parquet", "text"]
PATTERNS = {
    "redpajama_v2": f"{DOCUMENTS}**/*{SUFFIX}",
    "jsonl": "*.jsonl, *.jsonl.zst, *.jsonl.gz",
    "parquet": "*.parquet",
    "text": "*.txt, *.txt.zst, *.txt.gz",
}
"""The usual names of shards, for messages."""
RELEASED = re.compile(rf"{DOCUMENTS}\d{{4}}-\d{{2}}/\d+/[a-z]+_[a-z]+{re.escape(SUFFIX)}")
"""Documents of RedPajama v2 as they were released; other corpora have a folder `documents` too, such as Dolma."""
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
    """Paths relative to the folder."""
    domain_key: str | None = None
    """`data.domain_key`, see `records.domain_of`."""

    def record(self) -> dict[str, Any]:
        """Return everything as values that JSON has; the place is absolute."""
        return {
            "location": self.location,
            "root": self.folder.fs.unstrip_protocol(self.folder.path),
            "format": self.format,
            "shards": self.shards,
            "domain_key": self.domain_key,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Corpus":
        """Return the corpus that ``record`` was made of, without listing its folder again."""
        folder = _ShardFolder(get_datafolder(record["root"]), record["shards"])
        return cls(record["location"], folder, record["format"], record["shards"], record["domain_key"])

    def state(self) -> list[list[str]]:
        """Return name, size and time (or version) of every shard, which differ when the corpus has changed."""
        if self.folder.is_local():  # `find` does not follow links
            places = [os.stat(f"{self.folder.path}/{name}") for name in self.shards]
            return [
                [name, str(place.st_size), str(place.st_mtime)]
                for name, place in zip(self.shards, places, strict=True)
            ]
        one = len(self.shards) == 1
        found = (
            {self.shards[0]: self.folder.info(self.shards[0])} if one else self.folder.find("", detail=True)
        )
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
            return RedPajamaV2Reader(
                self.folder, self.domain_key, with_signals=with_signals, with_duplicates=with_duplicates
            )
        return (TextReader if self.format == "text" else RecordsReader)(self.folder, self.domain_key)


class _ShardFolder(DataFolder):
    """A folder that lists the shards of a format only, which is what a datatrove executor deals out to its tasks."""

    def __init__(self, folder: DataFolder, shards: list[str]) -> None:
        super().__init__(folder.path, fs=folder.fs)
        self._shards = shards

    def list_files(self, *args: object, **kwargs: object) -> list[str]:
        """Return the shards."""
        return list(self._shards)


def open_corpus(location: str, form: Format = "auto", domain_key: str | None = None) -> Corpus:
    """List the shards below a local folder or an fsspec URL such as s3://bucket/folder, or take a single file.

    Names that are sure and, where they are not, contents tell shards from other files; the log names what is left out.

    Raises:
        L0MoEError: the place cannot be opened or does not exist, or holds no shard, or shards of two formats.
    """
    folder, files = _open(location)
    found = {"redpajama_v2": [name for name in files if _is_v2(name, form)]}
    if not found["redpajama_v2"] and form != "redpajama_v2":
        found = find_shards(folder, files)
    wanted = ("redpajama_v2", *GUESSED) if form == "auto" else (form,)
    guessed = [name for name in wanted if found.get(name)]
    if len(guessed) > 1:
        raise L0MoEError(
            f"Corpus {location} holds shards of several formats ({', '.join(guessed)}); choose one with "
            "data.corpus_format."
        )
    if not guessed:
        raise L0MoEError(_nothing(location, files, found, wanted))
    if guessed == ["text"] and domain_key not in (None, FOLDER):
        raise L0MoEError(
            f"data.domain_key ({domain_key}) is a path in a record, and text files are none; set it to {FOLDER} or "
            "leave it out."
        )
    shards = sorted(found[guessed[0]])
    log_left_out(location, files, shards)
    return Corpus(location, _ShardFolder(folder, shards), guessed[0], shards, domain_key)


def _open(location: str) -> tuple[DataFolder, list[str]]:
    """Return a folder and the files below it, of a single file the folder that it lies in and its name."""
    try:
        folder = get_datafolder(location)
        if folder.fs.isfile(folder.path):
            above, _, name = folder.path.rpartition("/")
            return DataFolder(above or "/", fs=folder.fs), [name]
        if folder.isdir(""):
            return folder, list_files(folder)
    except (ImportError, ValueError, OSError) as error:
        raise L0MoEError(
            f"Corpus {location} cannot be opened ({' '.join(str(error).split())}); correct data.corpus, or install the "
            "fsspec package of its protocol."
        ) from error
    raise L0MoEError(
        f"Corpus folder {location} does not exist; set data.corpus to a folder of shards ({PATTERNS['jsonl']}, "
        f"{PATTERNS['parquet']}) or to a single one."
    )


def _is_v2(name: str, form: Format) -> bool:
    if form == "redpajama_v2":
        return name.startswith(DOCUMENTS) and name.endswith(SUFFIX) and not is_passed_over(name)
    return form == "auto" and RELEASED.fullmatch(name) is not None


def _nothing(location: str, files: list[str], found: dict[str, list[str]], wanted: tuple[str, ...]) -> str:
    texts = len(found.get("text", []))
    hint = "put shards there or correct data.corpus"
    if texts and "text" not in wanted:
        hint = f"set data.corpus_format to text to read its {texts} .txt file(s)"
    elif other := next((name for name, shards in found.items() if shards and name != "text"), None):
        hint = f"set data.corpus_format to {other} to read its {len(found[other])} file(s) of that form"
    elif files:
        hint = f"its {len(files)} file(s), such as {min(files)}, are none; {hint}"
    patterns = " or ".join(PATTERNS[name] for name in wanted)
    return f"Corpus {location} holds no shard ({patterns}); {hint}."

"""The shards of a corpus: those below a folder or fsspec URL, or a single file, and the reader of their format.

Which files are shards, and of which form, is told by the name where a name is sure, else by what they hold.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from datatrove.io import DataFolder, get_datafolder

from megatron_l0moe.curate.corpus.lines import BrokenShardError, read_chunks
from megatron_l0moe.curate.corpus.readers import (
    FOLDER,
    MAGIC,
    RecordsReader,
    ShardReader,
    TextReader,
    text_key,
)
from megatron_l0moe.curate.corpus.redpajama_v2 import DOCUMENTS, SUFFIX, RedPajamaV2Reader
from megatron_l0moe.errors import L0MoEError

logger = logging.getLogger(__name__)

PACKED = r"(\.(zst|zstd|gz|bz2|xz))?"
SURE = {
    "jsonl": re.compile(rf".*\.(jsonl|ndjson|jsonlines){PACKED}", re.IGNORECASE),
    "parquet": re.compile(r".*\.parquet", re.IGNORECASE),
    "text": re.compile(rf".*\.txt{PACKED}", re.IGNORECASE),
}
"""Names that say what a file is; whether it is sound is found out as it is read."""
JSON = re.compile(rf".*\.json{PACKED}", re.IGNORECASE)
UNFINISHED = re.compile(
    r"(/|~|\.(tmp|temp|part|partial|incomplete|crdownload|aria2|bak|orig|swp|lock))$", re.IGNORECASE
)
SNIFFED_BYTES = 1 << 16
"""Bytes of a file that are looked at where its name does not say what it is."""
NAMED = 8
"""Files that the log names of those that are left out; all are counted."""


def list_files(folder: DataFolder) -> list[str]:
    """Return all files below a folder, relative to it and sorted; links are followed.

    A hidden folder is one entry that ends with a slash, and so is what is neither file nor folder.

    Raises:
        L0MoEError: a folder cannot be listed, or a link leads nowhere.
    """
    if not folder.is_local():
        return list(folder.list_files())
    return sorted(_below(Path(folder.path)))


def _below(top: Path) -> Iterator[str]:
    """Yield the files below a local folder; a link to a folder above itself is not followed."""
    waiting = [(top, "", [_place(top)])]
    while waiting:
        folder, inside, above = waiting.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise L0MoEError(f"Corpus folder {folder} cannot be listed ({error.strerror}).") from error
        for entry in entries:
            name, path = inside + entry.name, Path(entry.path)
            try:
                place = _place(path) if path.is_dir() else None
                path.stat()
            except OSError as error:
                if not entry.name.startswith("."):
                    raise L0MoEError(
                        f"Corpus file {path} cannot be read ({error.strerror}); mount or copy what it leads to, or "
                        "remove it."
                    ) from error
            if place is None:
                yield name if path.is_file() else f"{name}/"
            elif entry.name.startswith("."):
                yield f"{name}/"
            elif place in above:
                logger.warning("%s leads back to a folder above it and is not followed", path)
            else:
                waiting.append((path, f"{name}/", [*above, place]))


def _place(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def find_shards(folder: DataFolder, files: Iterable[str]) -> dict[str, list[str]]:
    """Return the shards among files of a folder by their form: jsonl, parquet, text."""
    found: dict[str, list[str]] = {}
    for name in files:
        form = None if is_passed_over(name) else form_of(folder, name)
        if form:
            found.setdefault(form, []).append(name)
    return found


def is_passed_over(name: str) -> bool:
    """Say whether a file is hidden, or lies in a hidden folder, or is named as an unfinished download or a backup."""
    return any(part.startswith(".") for part in name.split("/")) or UNFINISHED.search(name) is not None


def form_of(folder: DataFolder, name: str) -> str | None:
    """Return the form of a file, None if it is no shard."""
    form = next((form for form, sure in SURE.items() if sure.fullmatch(name)), None)
    if form in ("jsonl", "parquet"):
        return form
    try:
        with folder.open(name, "rb") as file:
            return _sniffed(file.read(SNIFFED_BYTES), name) or form
    except OSError:
        return "jsonl" if JSON.fullmatch(name) else form  # the reader says what is wrong with it


def _sniffed(head: bytes, name: str) -> str | None:
    """Return the form that the beginning of a file tells, None if it is neither JSON lines nor Parquet."""
    if head.startswith(MAGIC):
        return "parquet"
    content, cut = b"", False
    try:
        for piece in read_chunks(BytesIO(head), name):
            content += piece[:SNIFFED_BYTES]
            if cut := len(content) >= SNIFFED_BYTES:
                break
    except BrokenShardError:  # cut off by us, or damaged
        if not content:
            return "jsonl" if JSON.fullmatch(name) else None
        cut = True
    line, ends, _ = content.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    if not line.startswith(b"{"):
        return None
    try:
        return "jsonl" if text_key(json.loads(line)) else None
    except (ValueError, RecursionError):
        return "jsonl" if cut and not ends else None  # a first line longer than what was looked at


def log_left_out(location: str, files: Iterable[str], shards: Iterable[str]) -> None:
    """Name the files that are not read."""
    others = sorted(set(files) - set(shards))
    if others:
        named = ", ".join(others[:NAMED]) + (", ..." if len(others) > NAMED else "")
        logger.info("corpus %s: %d file(s) are no shards and are not read: %s", location, len(others), named)


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

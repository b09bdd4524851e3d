"""Which files of a folder are shards, and of which form: by name where a name is sure, else by what they hold."""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path

from datatrove.io import DataFolder

from megatron_l0moe.data.lines import BrokenShardError, read_chunks
from megatron_l0moe.data.parquet_reader import MAGIC
from megatron_l0moe.data.records import text_key
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

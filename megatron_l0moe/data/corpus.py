"""Streaming reader of RedPajama-v1-style shards: JSON lines with `text` and `meta`, plain or zstd.

A shard is never held in memory: one line at a time, so that a corpus of any size can be read. Lines that are
not wanted are not parsed.
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import zstandard

from megatron_l0moe.errors import L0MoEError

SUFFIXES = (".jsonl", ".jsonl.zst")
CHUNK_BYTES = 1 << 20
UNKNOWN_DOMAIN = "unknown"


@dataclass(frozen=True)
class Document:
    """One line of a shard."""

    shard: str
    """Path of the shard relative to the corpus folder."""
    line: int
    """Line number in the shard, from 1."""
    text: str
    domain: str
    """`meta.source` up to its first slash, or "unknown"."""

    @property
    def id(self) -> str:
        """Name of the document: shard and line number."""
        return f"{self.shard}:{self.line}"


def find_shards(folder: Path) -> list[Path]:
    """Return the shards below ``folder``, sorted by their relative path.

    Raises:
        L0MoEError: the folder is missing or holds no shard.
    """
    if not folder.is_dir():
        raise L0MoEError(
            f"Corpus folder {folder} does not exist; set data.corpus to a folder of *.jsonl or *.jsonl.zst shards."
        )
    shards = [path for path in folder.rglob("*") if path.is_file() and path.name.endswith(SUFFIXES)]
    if not shards:
        raise L0MoEError(
            f"Corpus folder {folder} holds no *.jsonl or *.jsonl.zst shard; put RedPajama-style shards there or "
            "correct data.corpus."
        )
    return sorted(shards, key=lambda path: path.relative_to(folder).as_posix())


def read_shard(path: Path, name: str, wanted: Collection[int] | None = None) -> Iterator[Document]:
    """Yield the documents of one shard in order; with ``wanted`` only those line numbers.

    Raises:
        L0MoEError: a line that is wanted is not JSON or has no text, or a zstd frame is cut off.
    """
    for number, line in enumerate(_lines(path), start=1):
        if wanted is None or number in wanted:
            yield _parse(path, name, number, line)


def domain_of(meta: object) -> str:
    """Return the source domain of a document's `meta`.

    Common Crawl lines of RedPajama v1 carry `cc/2019-30/en_middle_0053.json.gz/line405796`; the domain is `cc`.
    """
    source = meta.get("source") if isinstance(meta, dict) else None
    domain = source.split("/", 1)[0].strip() if isinstance(source, str) else ""
    return domain or UNKNOWN_DOMAIN


def _parse(path: Path, name: str, number: int, line: bytes) -> Document:
    where = f"Line {number} of {path}"
    try:
        record = json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise L0MoEError(
            f"{where} is not valid UTF-8 JSON ({error}); repair or delete that line, or copy the shard again."
        ) from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise L0MoEError(
            f"{where} has no non-empty string `text`; each line must be like "
            '{"text": "...", "meta": {"source": "..."}}, so repair or delete that line.'
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise L0MoEError(
            f"{where} has a lone surrogate in `text` at character {error.start}, which no tokenizer accepts; "
            "repair or delete that line."
        ) from error
    return Document(name, number, text, domain_of(record.get("meta")))


def _lines(path: Path) -> Iterator[bytes]:
    """Yield lines without their newline; a last line without newline counts, an empty remainder does not."""
    pieces: list[bytes] = []  # of a line that spans chunks; joined once, so a huge line costs linear time
    with path.open("rb") as file:
        for chunk in _zstd_chunks(path, file) if path.suffix == ".zst" else _plain_chunks(file):
            first, *rest = chunk.split(b"\n")
            pieces.append(first)
            for piece in rest:
                yield b"".join(pieces)
                pieces = [piece]
    if last := b"".join(pieces):
        yield last


def _plain_chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _zstd_chunks(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Decompress all frames. The library's own stream reader ends quietly at a truncated frame; this does not."""
    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    open_frame = False
    try:
        for chunk in _plain_chunks(file):
            data = chunk
            while data:
                open_frame = True
                yield frame.decompress(data)
                if not frame.eof:
                    break
                data = frame.unused_data
                frame = decompressor.decompressobj()
                open_frame = False
    except zstandard.ZstdError as error:
        raise L0MoEError(
            f"Shard {path} is not valid zstd data ({error}); copy or download the shard again."
        ) from error
    if open_frame:
        raise L0MoEError(
            f"Shard {path} ends inside a zstd frame, so it is truncated; copy or download the shard again."
        )

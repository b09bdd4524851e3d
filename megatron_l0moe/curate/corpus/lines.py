"""Bytes of a shard, decompressed in bounded pieces and cut into lines; bad ones are set aside, counted, written down.

The content says how a shard is compressed. The memory is that of the longest line and less than 64 MB more, however
little the compressed file holds, beside what a frame itself asks for: up to 2 GiB where zstd was told to look back that
far (--long=31). zstandard's own file object is not used for this, since it ends quietly at a truncated frame, and
neither are readers of text, which lose the rest of a file at its first bad byte.

One bad line in a million must not cost a night, and a corpus in the wrong form must not pass as an empty one: too much
bad input stops the stage.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs.stage_folder import write_text

MAX_ENTRIES = 100_000
"""Entries that are written down; all are counted."""
QUOTED_BYTES = 200


class Quarantine:
    """What could not be read, where, and why."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        """Documents by reason."""
        self.side_reasons: Counter[str] = Counter()
        """Lines of files beside the documents, such as quality signals, by reason."""
        self.broken_shards: dict[str, str] = {}
        """Shards that cannot be read to their end, with the reason."""
        self._entries: list[str] = []
        self._first = ""

    @classmethod
    def merged(cls, parts: "Iterable[Quarantine]") -> "Quarantine":
        """Return what several parts of a corpus hold together, in their order."""
        whole = cls()
        for part in parts:
            whole.reasons.update(part.reasons)
            whole.side_reasons.update(part.side_reasons)
            whole.broken_shards |= part.broken_shards
            whole._entries += part._entries[: MAX_ENTRIES - len(whole._entries)]
            whole._first = whole._first or part._first
        return whole

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Quarantine":
        """Return the quarantine that ``record`` was made of."""
        quarantine = cls()
        quarantine.reasons.update(record["reasons"])
        quarantine.side_reasons.update(record["side_reasons"])
        quarantine.broken_shards |= record["broken_shards"]
        quarantine._entries, quarantine._first = record["entries"], record["first"]
        return quarantine

    def record(self) -> dict[str, Any]:
        """Return everything as values that JSON has."""
        return {
            "reasons": dict(self.reasons),
            "side_reasons": dict(self.side_reasons),
            "broken_shards": self.broken_shards,
            "entries": self._entries,
            "first": self._first,
        }

    def add(
        self, shard: str, line: int, reason: str, detail: str, content: bytes = b"", *, side: bool = False
    ) -> None:
        """Set one document aside, or (``side``) a line of a file beside the documents."""
        (self.side_reasons if side else self.reasons)[reason] += 1
        self._first = self._first or f"line {line} of {shard} {detail}"
        self._write(shard, line, reason, detail, content)

    def add_shard(self, shard: str, line: int, detail: str) -> None:
        """Note that ``shard`` cannot be read from ``line`` on."""
        self.broken_shards.setdefault(shard, detail)
        self._write(shard, line, "broken shard", detail, b"")

    def _write(self, shard: str, line: int, reason: str, detail: str, content: bytes) -> None:
        if len(self._entries) < MAX_ENTRIES:
            head = content[:QUOTED_BYTES].decode("utf-8", errors="backslashreplace")
            entry = {"shard": shard, "line": line, "reason": reason, "detail": detail, "head": head}
            self._entries.append(json.dumps(entry))

    def save(self, path: Path) -> None:
        """Write one JSON line for each entry; without entries there is no file."""
        path.unlink(missing_ok=True)
        if self._entries:
            write_text(path, "\n".join(self._entries) + "\n")

    def check(self, corpus: str, *, read: int, shards: int, limit: float, written_to: Path | None) -> None:
        """Stop when more was set aside than the recipe allows.

        Args:
            corpus: its name, for the message.
            read: documents that could be read.
            shards: of the corpus.
            limit: ``data.max_quarantined``, a fraction of the documents and of the shards.
            written_to: where the entries are, if anywhere.

        Raises:
            L0MoEError: it was more; the message names the first case.
        """
        where = f"see {written_to}, " if written_to else ""
        if len(self.broken_shards) > limit * shards:
            name, detail = next(iter(self.broken_shards.items()))
            raise L0MoEError(
                f"{len(self.broken_shards)} of {shards} shard(s) of corpus {corpus} cannot be read to the end (shard "
                f"{name} {detail}); {where}copy or download them again, or go on without their rest by raising "
                f"data.max_quarantined ({limit:g})."
            )
        reasons = self.reasons + self.side_reasons
        bad = reasons.total()
        if bad > limit * (bad + read):
            kinds = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            raise L0MoEError(
                f"{bad} of {bad + read} document(s) of corpus {corpus} cannot be used ({kinds}): {self._first}; "
                f"{where}repair or delete those lines, or go on without them by raising data.max_quarantined "
                f"({limit:g})."
            )


CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 30
"""A longer line is no document but a file without newlines; it is passed over without being held in memory."""
HEAD_BYTES = 512
"""Bytes that tell what a file is; a tar archive says so at byte 257."""
SLICE_BYTES = 256
"""Compressed bytes that zstd is given at a time, since nothing else bounds what it returns: 128 KiB for every 4 bytes
at most, which makes 8 MiB."""
MAX_WINDOW = 1 << 31
COMPRESSED = (".zst", ".zstd", ".gz", ".bz2", ".xz")
FOREIGN = {
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"PK\x03\x04": "zip",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x1f\x9d": "compress (.Z)",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"\xff\x06\x00\x00sNaPpY": "snappy",
}
"""What is no text and is not taken apart here, by its first bytes."""


class BrokenShardError(Exception):
    """A shard cannot be read from here on; what came before it stands. The message says why, without the name."""


class _Begun:
    """A file whose first bytes were looked at; they are read again."""

    def __init__(self, head: bytes, file: BinaryIO) -> None:
        self._head, self._file = head, file

    def read(self, size: int) -> bytes:
        """Return at most ``size`` bytes, none at the end."""
        head, self._head = self._head[:size], self._head[size:]
        return head or self._file.read(size)


def read_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes | None]]:
    """Yield (number from 1, line without its newline); None for a line of more than ``MAX_LINE_BYTES``.

    Blank lines count, but are no lines of text and are passed over. A last line needs no newline.

    Raises:
        BrokenShardError: the content is damaged, cut off, or neither text nor compressed text.
    """
    number, held, size = (
        1,
        io.BytesIO(),
        0,
    )  # held: the part of a line that earlier chunks hold; size: its bytes
    for chunk in read_chunks(file, name):
        if not size and (blank := _blank_lines(chunk)):
            number += blank
            continue
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            piece = chunk[start:end]
            start = end + 1
            if size:
                size += len(piece)
                piece = _joined(held, piece) if size <= MAX_LINE_BYTES else b""
            if max(size, len(piece)) > MAX_LINE_BYTES:
                yield number, None
            elif piece and not piece.isspace():
                yield number, piece
            number, size, held = number + 1, 0, held if not size else io.BytesIO()
        size += len(chunk) - start
        held = held if size <= MAX_LINE_BYTES else io.BytesIO()
        if size <= MAX_LINE_BYTES:
            held.write(memoryview(chunk)[start:])
    if size > MAX_LINE_BYTES:
        yield number, None
    elif size and not (rest := held.getvalue()).isspace():
        yield number, rest


def _blank_lines(chunk: bytes) -> int:
    """Return the lines of a chunk of blanks, 0 for any other; a page of compressed data can hold a gigabyte of them."""
    if not chunk.startswith(b"\n"):
        return 0
    if chunk == b"\n" * len(chunk):  # thirty times as fast as the next line
        return len(chunk)
    return chunk.count(b"\n") if chunk.isspace() else 0


def _joined(held: io.BytesIO, piece: bytes) -> bytes:
    held.write(piece)
    return held.getvalue()  # the buffer itself, not a copy: a line is in memory once


def read_chunks(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Yield the decompressed content in pieces of at most 8 MiB.

    What zstd, gzip, bzip2 and xz write is recognised by its first bytes, several frames or members too. ``name`` only
    decides what is said of a file that is named as compressed and holds neither that nor text.

    Raises:
        BrokenShardError: the content is damaged, cut off, or of a kind that is not read.
    """
    head = file.read(HEAD_BYTES)
    kind, pieces = _kind_of(head)
    if kind is None:
        if name.lower().endswith(COMPRESSED) and not is_text(head):
            raise BrokenShardError(
                f"is not valid {name.rpartition('.')[2]} data (it begins with {head[:4].hex()})"
            )
        kind, pieces = "text", _stored
    contents = pieces(_Begun(head, file))
    try:
        first = next(contents, b"")
        _refuse_foreign(first)
        yield from chain((first,) if first else (), contents)
    except EOFError as error:
        raise BrokenShardError(f"ends inside a {kind} frame, so it is truncated") from error
    except (zstandard.ZstdError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise BrokenShardError(f"is not valid {kind} data ({error})") from error
    except OSError as error:
        if error.errno is not None:  # bz2 has no error of its own
            raise
        raise BrokenShardError(f"is not valid {kind} data ({error})") from error


def _kind_of(head: bytes) -> tuple[str | None, Callable[[_Begun], Iterator[bytes]]]:
    """Return the compression that a file's first bytes tell, and what decompresses it."""
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):
        return "zstd", _zstd  # the second: a skippable frame, with which pzstd begins
    if head.startswith(b"\x1f\x8b"):
        return "gzip", _gzip
    if head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):
        return "bzip2", _bz2
    if head.startswith(b"\xfd7zXZ\x00"):
        return "xz", _xz
    return None, _stored


def _refuse_foreign(first: bytes) -> None:
    kind = next((kind for magic, kind in FOREIGN.items() if first.startswith(magic)), None)
    if kind or first[257:262] == b"ustar":
        raise BrokenShardError(
            f"holds {kind or 'tar'} data, which is not read in this place; unpack it, or write it as JSON lines"
        )


def is_compressed(head: bytes) -> bool:
    """Say whether a file that begins so is decompressed here."""
    return _kind_of(head)[0] is not None


def is_text(head: bytes) -> bool:
    """Say whether a file that begins so can be UTF-8 text."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(char.isprintable() or char.isspace() for char in text.removeprefix("\ufeff"))


def _stored(file: _Begun) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _gzip(file: Any) -> Iterator[bytes]:
    return _opened(gzip.GzipFile(fileobj=file, mode="rb"))


def _bz2(file: Any) -> Iterator[bytes]:
    return _opened(bz2.BZ2File(file))


def _xz(file: Any) -> Iterator[bytes]:
    return _opened(lzma.LZMAFile(file))


def _opened(file: gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile) -> Iterator[bytes]:
    with file:
        while chunk := file.read1(CHUNK_BYTES):
            yield chunk


def _zstd(file: _Begun) -> Iterator[bytes]:
    """Decompress all frames, and pass over skippable ones.

    Raises:
        EOFError: the last one is not whole.
    """
    library = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    frame, inside = library.decompressobj(), False
    while chunk := file.read(CHUNK_BYTES):
        data = memoryview(chunk)
        while data:
            piece = frame.decompress(data[:SLICE_BYTES])
            data = data[min(SLICE_BYTES, len(data)) - len(frame.unused_data) :]
            if piece:
                yield piece
            inside = not frame.eof
            if frame.eof:
                frame = library.decompressobj()
    if inside:
        raise EOFError

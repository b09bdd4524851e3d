"""Bytes of a shard, decompressed and cut into lines: a shard of any size takes the memory of its longest line.

The libraries' own file objects are not used for this: zstandard's ends quietly at a truncated frame, and one that
decodes text loses the rest of a file at its first bad byte.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import zstandard

CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 30
"""A longer line is no document but a file without newlines; it is passed over without being held in memory."""


class BrokenShardError(Exception):
    """A shard cannot be read from here on; what came before it stands. The message says why, without the name."""


def read_lines(file: BinaryIO, name: str) -> Iterator[bytes | None]:
    """Yield lines without their newline, None for one of more than ``MAX_LINE_BYTES``.

    A last line without newline counts, an empty remainder does not. ``name`` decides the compression.

    Raises:
        BrokenShardError: the compressed data is damaged or cut off.
    """
    pieces: list[bytes] = []  # of a line that spans chunks; joined once, so a huge line costs linear time
    held = 0
    for chunk in read_chunks(file, name):
        first, *rest = chunk.split(b"\n")
        held += len(first)
        pieces = [*pieces, first] if held <= MAX_LINE_BYTES else []
        for piece in rest:
            yield b"".join(pieces) if held <= MAX_LINE_BYTES else None
            pieces, held = [piece], len(piece)
    if held:
        yield b"".join(pieces) if held <= MAX_LINE_BYTES else None


def read_chunks(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Yield the decompressed content in pieces.

    Raises:
        BrokenShardError: the compressed data is damaged or cut off.
    """
    if name.endswith(".zst"):
        yield from _decompressed(_stored_chunks(file), zstandard.ZstdDecompressor().decompressobj, "zstd")
    elif name.endswith(".gz"):
        yield from _decompressed(_stored_chunks(file), _gzip_member, "gzip")
    else:
        yield from _stored_chunks(file)


def _stored_chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _gzip_member() -> Any:
    return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)


def _decompressed(chunks: Iterator[bytes], new_frame: Callable[[], Any], kind: str) -> Iterator[bytes]:
    """Decompress all frames (zstd) or members (gzip) of a file."""
    frame = new_frame()
    inside = False
    try:
        for chunk in chunks:
            data = chunk
            while data:
                inside = True
                yield frame.decompress(data)
                if not frame.eof:
                    break
                data = frame.unused_data
                frame = new_frame()
                inside = False
    except (zstandard.ZstdError, zlib.error) as error:
        raise BrokenShardError(f"is not valid {kind} data ({error})") from error
    if inside:
        raise BrokenShardError(f"ends inside a {kind} frame, so it is truncated")

"""The sha256 of files, computed by threads beside other work and remembered by this process: none is read twice.

A file is known by its device, inode, size and time of change: a rename keeps what is known of it, a write does not.
What is known is never shared with another process or kept for a later one. No torch.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

MAX_READERS = 8
"""Files that are read at a time: a checksum takes a core, and file systems of clusters like several readers."""

BUFFER_BYTES = 1 << 22
"""Hashed without Python's lock, which a thread may have to wait for between two of them."""

_Key = tuple[int, int, int, int]


@dataclass
class _State:
    """What this process knows, and the threads that find it out."""

    known: "dict[_Key, Future[str]]"
    pool: ThreadPoolExecutor | None = None
    following: bool = False


_STATE = _State({})


def compute(source: Path | int) -> str:
    """Return the sha256 of a file, or of an open one, which is closed, as 64 hex digits; reads it."""
    found, buffer = hashlib.sha256(), memoryview(bytearray(BUFFER_BYTES))
    with open(source, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found.update(buffer[:count])
    return found.hexdigest()


def begin(path: Path, *, moves: bool = False) -> "Future[str]":
    """Compute the sha256 of a whole file in a thread, unless it is known; hashing releases Python's lock.

    Args:
        moves: the file may get another name before the thread comes to it, so it is opened at once.
    """
    key = _key(path)
    if key not in _STATE.known:
        if _STATE.pool is None:
            _STATE.pool = ThreadPoolExecutor(min(MAX_READERS, max((os.cpu_count() or 1) - 1, 1)), "sha256")
        source = os.open(path, os.O_RDONLY) if moves else path
        _STATE.known[key] = _STATE.pool.submit(compute, source)
    return _STATE.known[key]


def remember(path: Path, digest: str) -> None:
    """Note a sha256 that was computed when the file was written."""
    known: Future[str] = Future()
    known.set_result(digest)
    _STATE.known[_key(path)] = known


@contextlib.contextmanager
def following() -> Iterator[None]:
    """Let `written` compute the sha256 of what is written in the `with` block, so that it is known at its end."""
    _STATE.following = True
    try:
        yield
    finally:
        _STATE.following = False


def written(path: Path) -> None:
    """Say that a file is whole, whatever name it will get; see `following`."""
    if _STATE.following:
        begin(path, moves=True)


def of(files: Mapping[str, Path]) -> dict[str, str]:
    """Return the sha256 of several files, read some at a time."""
    begun = {name: begin(path) for name, path in files.items()}
    return {name: digest.result() for name, digest in begun.items()}


def stop() -> None:
    """Give up what was begun; an interpreter waits for its threads before it ends."""
    if _STATE.pool is not None:
        _STATE.pool.shutdown(wait=False, cancel_futures=True)
    _forget()


def _key(path: Path) -> _Key:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _forget() -> None:
    _STATE.known, _STATE.pool, _STATE.following = {}, None, False


os.register_at_fork(after_in_child=_forget)  # threads do not survive a fork

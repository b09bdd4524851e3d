"""One command at a time on a run, or on one expert of it.

A lock is an advisory `flock` on a hidden file in the run folder. The kernel drops it when the last process that
holds the file open ends, so a lock cannot go stale; the pid in the file is there for the message. Child processes
inherit the open files and, by an environment variable, their numbers: they know that they hold the locks, and a
rerun waits until the children of a killed command have ended too.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from megatron_l0moe.errors import L0MoEError

logger = logging.getLogger(__name__)

INHERITED = "L0MOE_LOCK_FDS"
"""Environment variable with the descriptors that hold locks, for nested calls and for stage processes."""
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP)
"""What a file system without `flock` answers, such as Lustre mounted without that option."""
WAIT_SECONDS = 90.0
"""How long to wait for the children of a command that was killed."""


@contextlib.contextmanager
def locked(
    run_folder: Path, *, expert: int | None = None, wait: float = WAIT_SECONDS
) -> Iterator[tuple[int, ...]]:
    """Hold the lock of a run, or of one expert of it; yields all descriptors to hand to child processes.

    Commands on different experts share the run, so that a cluster can train them side by side; every other
    command has it alone.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    wanted = [(run_folder / ".lock", expert is not None)]
    if expert is not None:
        wanted.append((run_folder / f".lock-expert-{expert:03d}", False))
    before = os.environ.get(INHERITED)
    held = list(inherited())
    opened: list[int] = []
    try:
        for path, shared in wanted:
            if not any(_same_file(path, handle) for handle in held):
                opened.append(_acquire(path, shared=shared, wait=wait))
        os.environ[INHERITED] = ",".join(str(handle) for handle in (*held, *opened))
        yield (*held, *opened)
    finally:
        os.environ.pop(INHERITED, None)
        if before is not None:
            os.environ[INHERITED] = before
        for handle in opened:
            os.close(handle)


def inherited() -> tuple[int, ...]:
    """Return the descriptors that an enclosing call or the parent process handed us and that are open."""
    handles = []
    for word in os.environ.get(INHERITED, "").split(","):
        if word.isdigit():
            with contextlib.suppress(OSError):
                os.fstat(int(word))
                handles.append(int(word))
    return tuple(handles)


def _acquire(path: Path, *, shared: bool, wait: float) -> int:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _wait_for(handle, path, shared, wait)
    except BaseException:
        os.close(handle)
        raise
    os.truncate(handle, 0)
    os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
    return handle


def _wait_for(handle: int, path: Path, shared: bool, wait: float) -> None:
    deadline = time.monotonic() + wait
    told = False
    while True:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in NO_LOCKS:
                logger.warning(
                    "%s does not offer locks; see to it that one command at a time works there.", path.parent
                )
                return
            if not isinstance(error, BlockingIOError):
                raise
            owner = _owner(path)
            who = f"process {owner.get('pid')} on {owner.get('host')}"
            if _alive(owner):
                raise L0MoEError(
                    f"Another command ({who}) works on {path.parent}; wait until it ends, or stop it."
                ) from None
            if time.monotonic() > deadline:
                raise L0MoEError(
                    f"Processes of an earlier command ({who}) still work on {path.parent}; end them and run this again."
                ) from None
            if not told:
                logger.info("Waiting for the processes of an earlier command on %s to end.", path.parent)
                told = True
            time.sleep(0.2)


def _same_file(path: Path, handle: int) -> bool:
    try:
        ours, held = os.stat(path), os.fstat(handle)
    except OSError:
        return False
    return (ours.st_dev, ours.st_ino) == (held.st_dev, held.st_ino)


def _owner(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _alive(owner: dict[str, object]) -> bool:
    """Say whether the command that took the lock still runs; on another machine it is taken to run."""
    if owner.get("host") != socket.gethostname():
        return bool(owner)
    pid = owner.get("pid")
    try:
        return isinstance(pid, int) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

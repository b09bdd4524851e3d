"""What a driver sees of the tasks of a step while they run elsewhere: how far they are, and whether one was killed."""

import logging
import os
import shutil
import signal
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_l0moe.data.progress import Progress
from megatron_l0moe.errors import CorpusChangedError, L0MoEError
from megatron_l0moe.runtime.json_files import read_json

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0


class Watch:
    """Logs the progress of all tasks together, from a thread, as long as the block runs.

    datatrove's pool and Ray's wait for ever for a worker that the system has killed, which happens where memory is
    short. Such a worker on this machine is seen here, and the main thread is interrupted; `killed` tells it why.
    """

    def __init__(self, folder: Path, what: str, total: int | None, *, workers_here: bool) -> None:
        """Watch the step that writes to ``folder``; ``total`` counts what is left to do, if that is known."""
        self._folder = folder
        self._progress = Progress(logger, what, total)
        self._workers_here = workers_here
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="watch", daemon=True)
        self._counted = 0
        self.killed = False

    def __enter__(self) -> "Watch":
        for name in ("progress", "errors"):
            shutil.rmtree(self._folder / name, ignore_errors=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def look(self) -> None:
        """Log what has been done since the last look, if it is time to."""
        states = task_states(self._folder)
        done = sum(state["done"] for state in states.values())
        self._progress.advance(max(done - self._counted, 0))
        self._counted = max(done, self._counted)
        if self._workers_here and any(self._is_killed(rank, state) for rank, state in states.items()):
            self.killed = True
            self._stop.set()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def _loop(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            self.look()

    def _is_killed(self, rank: int, state: dict[str, Any]) -> bool:
        if state["host"] != socket.gethostname() or _is_alive(state["pid"]):
            return False
        # After an error in one task the pool ends the others.
        failed = any((self._folder / "errors").glob("[0-9]*.json"))
        return not failed and not completion_file(self._folder, rank).exists()


def task_states(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the last report of each task of this run, by rank."""
    states = {}
    for file in (folder / "progress").glob("[0-9]*.json"):
        states[int(file.stem)] = read_json(file, "start curate again")
    return states


def completion_file(folder: Path, rank: int) -> Path:
    """Return the file by which datatrove knows a task that is done."""
    return folder / "datatrove" / "completions" / f"{rank:05d}"


def raise_task_error(folder: Path) -> None:
    """Raise what a task failed with, if one wrote it down.

    Raises:
        L0MoEError: a problem that a user can solve, or the last line of another one and where its traceback is.
    """
    for file in sorted((folder / "errors").glob("[0-9]*.json")):
        report = read_json(file, "start curate again")
        if report["kind"] == CorpusChangedError.__name__:
            raise CorpusChangedError(report["sentence"])
        if report["sentence"]:
            raise L0MoEError(report["sentence"])
        last = report["traceback"].strip().splitlines()[-1]
        raise L0MoEError(f"Task {int(file.stem)} of curate failed ({last}); its traceback is in {file}.")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""The base of curate's datatrove steps: a task does its share of the units, and leaves whole units or nothing.

While tasks run elsewhere, their driver sees how far they are, and whether one was killed.
"""

import logging
import os
import shutil
import signal
import socket
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

import multiprocess
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger as datatrove_logger

from megatron_l0moe.curate.tasks.units import UnitPlan, Workspace, published, read_record, write_record
from megatron_l0moe.errors import CorpusChangedError, L0MoEError
from megatron_l0moe.runs.stage_folder import write_json
from megatron_l0moe.runtime.hardware import gpu_share, visible_gpus
from megatron_l0moe.runtime.json_files import read_json

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 5.0


class ProgressLog:
    """Logs done/total, rate and time left at most every ``INTERVAL_SECONDS``."""

    def __init__(self, logger: logging.Logger, what: str, total: int | None = None) -> None:
        self._logger = logger
        self._what = what
        self._total = total
        self._done = 0
        self._start = self._last = time.monotonic()

    def advance(self, count: int = 1) -> None:
        """Count ``count`` more items and log if it is time to."""
        self._done += count
        now = time.monotonic()
        if now - self._last < INTERVAL_SECONDS:
            return
        self._last = now
        rate = self._done / (now - self._start)
        if self._total is None or not self._done:
            self._logger.info("%s: %d (%.0f/s)", self._what, self._done, rate)
            return
        left = max(self._total - self._done, 0) / rate
        self._logger.info(
            "%s: %d/%d (%.0f/s, about %.0f s left)", self._what, self._done, self._total, rate, left
        )


LOOK_SECONDS = 2.0


class Watch:
    """Logs the progress of all tasks together, from a thread, as long as the block runs.

    datatrove's pool and Ray's wait for ever for a worker that the system has killed, which happens where memory is
    short. Such a worker on this machine is seen here, and the main thread is interrupted; `killed` tells it why.
    """

    def __init__(self, folder: Path, what: str, total: int | None, *, workers_here: bool) -> None:
        """Watch the step that writes to ``folder``; ``total`` counts what is left to do, if that is known."""
        self._folder = folder
        self._progress = ProgressLog(logger, what, total)
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


REPORT_SECONDS = 2.0
"""Between two reports of a task on how far it is."""

# datatrove writes several lines for each task to stderr. What a person needs of them, how far the tasks are and why one
# failed, comes from the files that a task leaves, which `Watch` reads.
datatrove_logger.disable("datatrove")


class UnitStep(PipelineStep):
    """Does the units rank, rank + world_size, ... of a plan that are not done yet.

    A step travels to other processes and machines, so it holds paths and settings only.
    """

    type = "curate"

    def __init__(self, name: str, workspace: Workspace, folder: Path) -> None:
        """Name the step; its plan is to be saved in ``folder``.

        Args:
            name: what the step does, one word.
            workspace: of the stage.
            folder: for everything that the step writes, but for what is published elsewhere in the stage's folder.
        """
        self.name = name
        super().__init__()
        self.workspace = workspace
        self.folder = folder
        self.threads: int | None = None
        """The threads of each task; None: what the machine has."""
        self._rank = 0
        self._done = 0
        self._reported = 0.0

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Do this task's share. datatrove calls it; a failure is also written down, since not all executors tell."""
        self._rank, self._done = rank, 0
        try:
            self._report()
            self._take_place()
            plan = UnitPlan.load(self.folder)
            for unit in range(rank, len(plan), world_size):
                if read_record(self.workspace.out, self.folder, unit, plan.digest(unit)) is None:
                    self._do(plan, unit)
        except Exception as error:
            sentence = str(error) if isinstance(error, L0MoEError) else ""
            kind = type(error).__name__
            report = {"kind": kind, "sentence": sentence, "traceback": traceback.format_exc()}
            write_json(self.folder / "errors" / f"{rank:05d}.json", report)
            raise

    def do_unit(self, plan: UnitPlan, unit: int, files: tuple[Path, ...]) -> dict[str, Any]:
        """Do one unit: write ``files``, which are the hidden names of `files_of`; returns what the record tells."""
        raise NotImplementedError

    def files_of(self, plan: UnitPlan, unit: int) -> tuple[Path, ...]:
        """Return the files that a unit makes."""
        raise NotImplementedError

    def advance(self, count: int) -> None:
        """Count items that were done."""
        self._done += count
        if time.monotonic() - self._reported >= REPORT_SECONDS:
            self._report()

    def _do(self, plan: UnitPlan, unit: int) -> None:
        files = self.files_of(plan, unit)
        with published(*files, folder=self.folder) as hidden:
            content = self.do_unit(plan, unit, hidden)
            # A task that outlived its driver must not write into work that was begun anew with other settings.
            self.workspace.check_current()
        write_record(self.workspace.out, self.folder, unit, plan.digest(unit), files, content)

    def _report(self) -> None:
        """Tell how far this task is, and end it if it is a worker of a driver that is gone."""
        self._reported = time.monotonic()
        parent = multiprocess.process.parent_process()
        if parent is not None and not parent.is_alive():
            raise L0MoEError(
                f"The process that started this task of {self.name} has ended, so the task ends too."
            )
        state = {"done": self._done, "host": socket.gethostname(), "pid": os.getpid()}
        write_json(self.folder / "progress" / f"{self._rank:05d}.json", state)

    def _take_place(self) -> None:
        """Keep to this task's threads and, in one of several local workers, to a GPU of its own."""
        if self.threads is not None:
            os.environ["RAYON_NUM_THREADS"] = str(self.threads)  # of tokenizers
            os.environ["OMP_NUM_THREADS"] = str(self.threads)
        if multiprocess.process.parent_process() is not None:
            # Ray's handler raises, which is lost in a destructor such as FlagEmbedding's; the pool then waits for ever.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        place = multiprocess.process.current_process()._identity
        gpus = visible_gpus() if place and os.environ.get("DATATROVE_EXECUTOR") == "LOCAL" else 0
        if gpus:
            os.environ.update(gpu_share((place[-1] - 1) % gpus, 1))

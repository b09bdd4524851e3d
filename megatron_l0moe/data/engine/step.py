"""The base of curate's datatrove steps: a task does its share of the units, and leaves whole units or nothing."""

import os
import signal
import socket
import time
import traceback
from pathlib import Path
from typing import Any

import multiprocess
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger as datatrove_logger

from megatron_l0moe.data.engine.units import Plan, published, read_record, write_record
from megatron_l0moe.data.engine.workspace import Workspace
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs.stage_folder import write_json
from megatron_l0moe.runtime.gpus import gpu_share, visible_gpus

REPORT_SECONDS = 2.0
"""Between two reports of a task on how far it is."""

# datatrove writes several lines for each task to stderr. What a person needs of them, how far the tasks are and why one
# failed, comes from the files that a task leaves; see `watch.py`.
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
        """Of each task; None: what the machine has."""
        self._rank = 0
        self._done = 0
        self._reported = 0.0

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Do this task's share. datatrove calls it; a failure is also written down, since not all executors tell."""
        self._rank, self._done = rank, 0
        try:
            self._report()
            self._take_place()
            plan = Plan.load(self.folder)
            for unit in range(rank, len(plan), world_size):
                if read_record(self.workspace.out, self.folder, unit, plan.digest(unit)) is None:
                    self._do(plan, unit)
        except Exception as error:
            sentence = str(error) if isinstance(error, L0MoEError) else ""
            kind = type(error).__name__
            report = {"kind": kind, "sentence": sentence, "traceback": traceback.format_exc()}
            write_json(self.folder / "errors" / f"{rank:05d}.json", report)
            raise

    def do_unit(self, plan: Plan, unit: int, files: tuple[Path, ...]) -> dict[str, Any]:
        """Do one unit: write ``files``, which are the hidden names of `files_of`; returns what the record tells."""
        raise NotImplementedError

    def files_of(self, plan: Plan, unit: int) -> tuple[Path, ...]:
        """Return the files that a unit makes."""
        raise NotImplementedError

    def advance(self, count: int) -> None:
        """Count items that were done."""
        self._done += count
        if time.monotonic() - self._reported >= REPORT_SECONDS:
            self._report()

    def _do(self, plan: Plan, unit: int) -> None:
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

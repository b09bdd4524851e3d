"""A step of curate as a Slurm job array by datatrove's executor, submitted here or found from an earlier driver."""

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from datatrove.executor.slurm import SlurmPipelineExecutor

from megatron_l0moe.data.engine.step import UnitStep
from megatron_l0moe.data.engine.watch import completion_file, task_states
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.sections import ExecutorSection
from megatron_l0moe.runs.caller_environment import for_slurm, replace
from megatron_l0moe.runs.stage_folder import write_text

logger = logging.getLogger(__name__)

POLL_SECONDS = 10.0
"""Between two looks at what a job array has done."""
SAY_SECONDS = 60.0
PATIENCE_POLLS = 3
"""Looks after the end of a job: a shared file system may show its last files late."""


class _ArrayExecutor(SlurmPipelineExecutor):
    """datatrove's, without the job that it submits after the array to sum its statistics, which nobody reads.

    After a failed task that job would wait in the queue for ever, for a success.
    """

    def launch_merge_stats(self) -> None:
        """Submit nothing."""


def run_array(step: UnitStep, section: ExecutorSection, tasks: int, *, logs: str, takes_gpu: bool) -> None:
    """Submit a job array, or find the one that an earlier driver submitted, and wait for it.

    Raises:
        L0MoEError: sbatch refused it, or it ended and some tasks are not done.
    """
    note = step.folder / "slurm_job"
    job = note.read_text(encoding="utf-8").strip() if note.is_file() else ""
    if not (job and _is_queued(job)):
        job = _submit(step, section, tasks, logs=logs, takes_gpu=takes_gpu)
        write_text(note, job)
    _wait(step, job, tasks, logs)


def _submit(step: UnitStep, section: ExecutorSection, tasks: int, *, logs: str, takes_gpu: bool) -> str:
    assert section.slurm, "the recipe was checked"
    executor = _ArrayExecutor(
        [step],
        tasks=tasks,
        time=section.slurm.time,
        partition=section.slurm.partition,
        cpus_per_task=section.cpus_per_task,
        mem_per_cpu_gb=section.mem_per_cpu_gb,
        gpus_per_task=section.gpus_per_task if takes_gpu else 0,
        workers=section.workers,
        job_name=f"l0moe-{step.name}",
        qos=section.slurm.qos,
        env_command=section.slurm.environment or f'export PATH="{Path(sys.executable).parent}:$PATH"',
        sbatch_args=dict(section.slurm.sbatch),
        logging_dir=logs,
    )
    try:
        lines = ("partition", *(("qos",) if section.slurm.qos else ()), *section.slurm.sbatch)
        with _outside_of_a_job("".join(f"#SBATCH --{name}\n" for name in lines)):
            executor.run()
    except (OSError, subprocess.CalledProcessError) as error:
        raise L0MoEError(
            f"sbatch could not submit the tasks of {step.name} ({error}; its own words stand before this); correct "
            "data.executor, or start curate where Slurm's commands are."
        ) from error
    return str(executor.job_id)


@contextlib.contextmanager
def _outside_of_a_job(said: str) -> Iterator[None]:
    """Hide the job that this process may run in, and variables that would win over the script's lines, `said`.

    sbatch hands the environment on, and srun would take the outer job's memory and counts for the inner one's.
    """
    ours = dict(os.environ)
    replace(os.environ, for_slurm(ours, said))
    try:
        yield
    finally:
        replace(os.environ, ours)


def _wait(step: UnitStep, job: str, tasks: int, logs: str) -> None:
    """Wait until every task of a job array has its completion marker.

    Raises:
        L0MoEError: the job is gone and some are not done.
    """
    said, gone = -SAY_SECONDS, 0
    while missing := [rank for rank in range(tasks) if not completion_file(step.folder, rank).exists()]:
        if any((step.folder / "errors").glob("[0-9]*.json")):
            subprocess.run(["scancel", job], check=False, capture_output=True)
            return  # the caller tells what it was
        gone = 0 if _is_queued(job) else gone + 1
        if gone > PATIENCE_POLLS:
            raise L0MoEError(
                f"Slurm job {job} ended with {len(missing)} of {tasks} task(s) of {step.name} not done (the first is "
                f"task {missing[0]}); see {logs}/slurm_logs, and run the same command to go on."
            )
        if time.monotonic() - said >= SAY_SECONDS:
            said = time.monotonic()
            logger.info(
                "waiting for Slurm job %s: %d of %d tasks of %s done, %d started",
                *(job, tasks - len(missing), tasks, step.name, len(task_states(step.folder))),
            )
        time.sleep(POLL_SECONDS)


def _is_queued(job: str) -> bool:
    """Say whether Slurm still knows a job as waiting or running; a Slurm that does not answer is given time."""
    try:
        words, variables = ["squeue", "--noheader", "--jobs", job], for_slurm(os.environ)
        answer = subprocess.run(words, capture_output=True, text=True, check=False, env=variables)
    except OSError:
        return False
    if answer.returncode:
        return "invalid job id" not in answer.stderr.lower()
    return bool(answer.stdout.strip())

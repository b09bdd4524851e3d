"""A step on datatrove's executors: this machine, a Slurm array, or Ray; the driver waits until its tasks are done."""

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import multiprocess
from datatrove.executor.local import LocalPipelineExecutor

from megatron_l0moe.data.engine.step import UnitStep
from megatron_l0moe.data.engine.watch import completion_file, task_states
from megatron_l0moe.data.manifest import write_text
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe_sections import ExecutorSection
from megatron_l0moe.runtime.devices import visible_gpus

logger = logging.getLogger(__name__)

POLL_SECONDS = 10.0
"""Between two looks at what a Slurm array has done."""
SAY_SECONDS = 60.0
PATIENCE_POLLS = 3
"""Looks after the end of a Slurm job: a shared file system may show its last files late."""


def execute(step: UnitStep, section: ExecutorSection, tasks: int, *, takes_gpu: bool) -> None:
    """Run those of ``tasks`` tasks that have no completion marker, and wait for them.

    Raises:
        L0MoEError: the scheduler cannot run them, or (Slurm) they ended without being done.
        Exception: whatever a local task raised. Ray raises nothing: look at what is there.
    """
    in_process = section.kind == "local" and section.workers == 1
    step.threads = None if in_process else section.cpus_per_task
    if section.kind == "local":
        _run_local(step, section.workers, tasks, takes_gpu=takes_gpu)
    elif section.kind == "ray":
        _run_ray(step, section, tasks, takes_gpu=takes_gpu)
    else:
        _run_slurm(step, section, tasks, takes_gpu=takes_gpu)


@contextlib.contextmanager
def session(section: ExecutorSection) -> Iterator[None]:
    """Have Ray running for the steps inside, where the recipe asks for it."""
    if section.kind == "slurm" and "SLURM_ARRAY_TASK_ID" in os.environ:
        raise L0MoEError(
            "curate with data.executor.kind slurm submits jobs, which cannot be done inside a task of a job array; "
            "start it on a login node or in a job of its own."
        )
    if section.kind != "ray":
        yield
        return
    try:
        import ray
    except ImportError as error:
        raise L0MoEError(
            "data.executor.kind is ray, but ray is not installed; pip install 'megatron-l0moe[ray]', or choose local."
        ) from error
    cpus = None if section.ray_address else max(section.workers * section.cpus_per_task, 1)
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(
                address=section.ray_address or "local", num_cpus=cpus, include_dashboard=False,
                log_to_driver=False, logging_level=logging.ERROR,
            )  # fmt: skip
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise L0MoEError(
                f"Ray cannot be reached at {section.ray_address or 'this machine'} ({reason}); correct "
                "data.executor.ray_address."
            ) from error
    try:
        _check_resources(section, ray.cluster_resources())
        yield
    finally:
        if ours:
            ray.shutdown()


class _InProcessExecutor(LocalPipelineExecutor):
    """One worker, which is this process. datatrove's own starts a server beside it, which outlives a killed driver."""

    def run(self) -> None:
        """Run the tasks that are not done, one after the other."""
        for rank in self.get_incomplete_ranks():
            self._run_for_rank(rank)


def _run_local(step: UnitStep, workers: int, tasks: int, *, takes_gpu: bool) -> None:
    if workers == 1:
        _InProcessExecutor([step], tasks=tasks, workers=1, logging_dir=_logs(step)).run()
        return
    if takes_gpu:
        workers = min(workers, visible_gpus() or workers)
    # A fork server, since a forked copy of this process could hang in the threads of torch or the tokenizers. What it
    # imports itself does not touch a GPU, which could not be used in its forks then.
    multiprocess.set_forkserver_preload(["megatron_l0moe.data.steps", "torch"])
    LocalPipelineExecutor(
        [step], tasks=tasks, workers=workers, logging_dir=_logs(step), start_method="forkserver"
    ).run()


def _run_ray(step: UnitStep, section: ExecutorSection, tasks: int, *, takes_gpu: bool) -> None:
    from datatrove.executor.ray import RayPipelineExecutor

    RayPipelineExecutor(
        [step],
        tasks=tasks,
        workers=section.workers,
        logging_dir=_logs(step),
        cpus_per_task=section.cpus_per_task,
        mem_per_cpu_gb=section.mem_per_cpu_gb,
        gpus_per_task=section.gpus_per_task if takes_gpu else 0,
    ).run()


def _run_slurm(step: UnitStep, section: ExecutorSection, tasks: int, *, takes_gpu: bool) -> None:
    """Submit a job array, or find the one that an earlier driver submitted, and wait for it."""
    from datatrove.executor.slurm import SlurmPipelineExecutor

    assert section.slurm, "the recipe was checked"
    note = step.folder / "slurm_job"
    job = note.read_text(encoding="utf-8").strip() if note.is_file() else ""
    if not (job and _is_queued(job)):
        executor = SlurmPipelineExecutor(
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
            logging_dir=_logs(step),
        )
        try:
            executor.run()
        except (OSError, subprocess.CalledProcessError) as error:
            raise L0MoEError(
                f"sbatch could not submit the tasks of {step.name} ({error}); correct data.executor, or start curate "
                "where Slurm's commands are."
            ) from error
        job = str(executor.job_id)
        write_text(note, job)
    _wait(step, job, tasks)


def _wait(step: UnitStep, job: str, tasks: int) -> None:
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
                f"task {missing[0]}); see {_logs(step)}/slurm_logs, and run the same command to go on."
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
        answer = subprocess.run(
            ["squeue", "--noheader", "--jobs", job], capture_output=True, text=True, check=False
        )
    except OSError:
        return False
    if answer.returncode:
        return "invalid job id" not in answer.stderr.lower()
    return bool(answer.stdout.strip())


def _check_resources(section: ExecutorSection, have: dict[str, float]) -> None:
    """Refuse what Ray would wait for without end.

    Raises:
        L0MoEError: the whole cluster has less than one task asks for.
    """
    memory = section.mem_per_cpu_gb * section.cpus_per_task * 1024**3
    for what, need, key in (
        ("CPU", section.cpus_per_task, "cpus_per_task"),
        ("GPU", section.gpus_per_task, "gpus_per_task"),
        ("memory", memory, "mem_per_cpu_gb"),
    ):
        if have.get(what, 0) < need:
            raise L0MoEError(
                f"A task asks for {need:g} of {what}, but the whole Ray cluster has {have.get(what, 0):g}; lower "
                f"data.executor.{key}."
            )


def _logs(step: UnitStep) -> str:
    return str(step.folder / "datatrove")

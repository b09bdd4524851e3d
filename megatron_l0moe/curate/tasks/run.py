"""A step from its plan to whole units: only what is missing is done, and what was done is looked at again.

Tasks run on one of datatrove's executors: this machine, a Slurm job array, submitted here or found from an earlier
driver, or Ray. The driver waits until they are done.
"""

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
from datatrove.executor.slurm import SlurmPipelineExecutor

from megatron_l0moe.curate.tasks.step import UnitStep, Watch, completion_file, raise_task_error, task_states
from megatron_l0moe.curate.tasks.units import UnitPlan, UnitRecord, read_records
from megatron_l0moe.errors import CorpusChangedError, L0MoEError
from megatron_l0moe.recipe.sections import ExecutorSection
from megatron_l0moe.runs.caller_environment import for_slurm, replace
from megatron_l0moe.runs.stage_folder import write_text
from megatron_l0moe.runtime.hardware import visible_gpus

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
    """Wait until every task of a job array has its completion marker."""
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
        run_array(step, section, tasks, logs=_logs(step), takes_gpu=takes_gpu)


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
    multiprocess.set_forkserver_preload(["megatron_l0moe.curate.steps", "torch"])
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


def run_step(
    step: UnitStep,
    plan: UnitPlan,
    section: ExecutorSection,
    *,
    what: str,
    count_items: bool = True,
    takes_gpu: bool = False,
) -> list[UnitRecord]:
    """Do all units of a plan that are not whole yet, and return the records of all, in their order.

    Args:
        step: what is done.
        plan: all of its units.
        section: where it is done.
        what: for the progress lines, such as "embedded documents".
        count_items: the step counts the plan's items, so it is known how many there are.
        takes_gpu: a task computes on a GPU where there is one.

    Raises:
        L0MoEError: a task failed, or a unit is not whole although its task said so.
    """
    root, folder = step.workspace.out, step.folder
    plan.save(folder)
    records = read_records(root, folder, plan, range(len(plan)))
    missing = [unit for unit, record in enumerate(records) if record is None]
    if len(missing) < len(plan):
        logger.info("%s: %d of %d units were done before", what, len(plan) - len(missing), len(plan))
    if missing:
        tasks = min(section.tasks or section.workers, len(plan))
        _mark(step, tasks, missing)
        left = sum(len(plan.items_of(unit)) for unit in missing) if count_items else None
        _watched(step, section, tasks, what, left, takes_gpu=takes_gpu)
        for unit, record in zip(missing, read_records(root, folder, plan, missing), strict=True):
            records[unit] = record
    broken = [unit for unit, record in enumerate(records) if record is None]
    if broken:
        raise L0MoEError(
            f"Unit {broken[0]} of {step.name} ({len(broken)} of {len(plan)} in all) is not whole in {folder} although "
            f"its task ended; see {folder / 'datatrove'}, check the disk, and run the same command to go on."
        )
    return [record for record in records if record]


def _mark(step: UnitStep, tasks: int, missing: list[int]) -> None:
    """Take datatrove's completion marker from tasks that have something to do.

    Markers of an earlier run may be of another number of tasks, or of files that have been damaged since.
    """
    unfinished = {unit % tasks for unit in missing}
    folder = completion_file(step.folder, 0).parent
    folder.mkdir(parents=True, exist_ok=True)
    for marker in folder.iterdir():
        if int(marker.name) >= tasks or int(marker.name) in unfinished:
            marker.unlink()


def _watched(
    step: UnitStep, section: ExecutorSection, tasks: int, what: str, total: int | None, *, takes_gpu: bool
) -> None:
    here = section.kind == "ray" or section.workers > 1
    with Watch(step.folder, what, total, workers_here=here and section.kind != "slurm") as watch:
        try:
            execute(step, section, tasks, takes_gpu=takes_gpu)
        except CorpusChangedError:
            raise
        except KeyboardInterrupt as interrupt:
            if not watch.killed:
                raise
            raise L0MoEError(
                f"A worker of {step.name} was killed from outside, as happens when memory runs out; lower "
                "data.executor.workers, and run the same command to go on."
            ) from interrupt
        except Exception:
            if section.kind != "local" or section.workers > 1:
                raise_task_error(step.folder)
            raise
    raise_task_error(step.folder)

"""A step on datatrove's executors: this machine, a Slurm array, or Ray; the driver waits until its tasks are done."""

import contextlib
import logging
import os
from collections.abc import Iterator

import multiprocess
from datatrove.executor.local import LocalPipelineExecutor

from megatron_l0moe.data.engine.step import UnitStep
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.sections import ExecutorSection
from megatron_l0moe.runtime.gpus import visible_gpus


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
        from megatron_l0moe.data.engine.slurm_array import run_array

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

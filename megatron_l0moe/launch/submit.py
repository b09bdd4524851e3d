"""`l0moe run RECIPE --launcher slurm`: the whole chain as jobs, each after the one before it has succeeded."""

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.launch import sbatch
from megatron_l0moe.launch.chain_jobs import Part, earlier_jobs, missing_parts
from megatron_l0moe.launch.cluster import Cluster
from megatron_l0moe.launch.resources import experts_at_once, resources
from megatron_l0moe.launch.slurm_preflight import check_cluster, check_files, check_memory
from megatron_l0moe.launch.slurm_record import Record, SubmittedJob, now, read_record, write_record
from megatron_l0moe.launch.stages import Run, StageSpec
from megatron_l0moe.runs import slurm_commands
from megatron_l0moe.runs.caller_environment import for_slurm
from megatron_l0moe.runs.lock import locked
from megatron_l0moe.runs.stage_folder import write_json, write_text
from megatron_l0moe.sizes.architecture import Architecture

logger = logging.getLogger(__name__)
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A run, the part of it that is wanted, and where it is to run."""

    run: Run
    selected: tuple[StageSpec, ...]
    cluster: Cluster
    cluster_file: Path


def submit_chain(request: Request, say: Say) -> None:
    """Submit what is neither done nor queued; nothing, if the folder, the recipe or the cluster does not allow it.

    Raises:
        L0MoEError: something does not fit, or sbatch refuses a job; then nothing is queued, or not any more.
    """
    run = request.run
    check_files(run.recipe)
    check_cluster(run.recipe, request.cluster, request.selected)
    check_memory(run.recipe, request.cluster, request.selected)
    with locked(run.folder / "slurm"):  # two submissions at a time; the jobs take the run's own lock
        record = read_record(run.folder)
        known = slurm_commands.states(job.job for job in record.jobs)
        parts = missing_parts(run, request.selected, record, known)
        if not any(part.submit for part in parts):
            say(_nothing_to_do(run, parts))
            return
        if not any(state.alive for state in known.values()):
            with locked(run.folder, wait=0.0):
                pass  # no command on this machine works on the run
        before = earlier_jobs(run, request.selected, record, known)
        _write_scripts(request, parts)
        _say_what_is_left_out(request, parts, say)
        _ask_for_refusals(request, parts)
        _submit(request, parts, before, record, say)


def refuse_if_queued(run: Run) -> None:
    """Refuse to work on a run here while jobs of it wait or run on a cluster.

    Raises:
        L0MoEError: they do.
    """
    record = read_record(run.folder)
    try:
        known = slurm_commands.states(dict.fromkeys(job.job for job in record.jobs))
    except slurm_commands.SlurmUnreachableError as error:
        logger.warning("Whether jobs of this run are queued is not known: %s", error)
        return
    if alive := [state.job for state in known.values() if state.alive]:
        raise L0MoEError(
            f"The run {run.recipe.name} is queued on Slurm ({_short(alive)}); wait for it, add --launcher slurm, or "
            f"end its jobs with `l0moe cancel {run.folder}` first."
        )


def cancel_run(run_folder: Path) -> list[str]:
    """End all jobs of a run that still wait or run; returns them.

    Raises:
        L0MoEError: Slurm could not be asked.
    """
    with locked(run_folder / "slurm"):
        record = read_record(run_folder)
        numbers = list(dict.fromkeys(job.job for job in record.jobs))
        alive = [state.job for state in slurm_commands.states(numbers).values() if state.alive]
        wanted = list(dict.fromkeys(job.partition("_")[0] for job in alive))
        # the last stage first, so that no job starts because the one before it went away
        slurm_commands.cancel(wanted[::-1])
        return wanted


def write_scripts(
    request: Request, architecture: Architecture, place: sbatch.Place, names: Sequence[str]
) -> None:
    """Write the batch scripts of some stages."""
    for name in names:
        text = sbatch.render(request.run, architecture, request.cluster, name, place)
        write_text(place.script(name), text)


def _write_scripts(request: Request, parts: Sequence[Part]) -> None:
    run, place = request.run, sbatch.place_of(request.run)
    place.logs.mkdir(parents=True, exist_ok=True)
    write_json(run.folder / "recipe.json", run.recipe.model_dump())
    write_json(place.scripts / "cluster.json", json.loads(request.cluster.model_dump_json()))
    architecture = Architecture.from_hf(Path(run.recipe.model.path))
    write_scripts(request, architecture, place, [part.spec.name for part in parts if part.submit])


def _say_what_is_left_out(request: Request, parts: Sequence[Part], say: Say) -> None:
    """Name the variables of sbatch that the cluster file goes before."""
    scripts = [sbatch.place_of(request.run).script(part.spec.name) for part in parts if part.submit]
    kept = [for_slurm(os.environ, script.read_text(encoding="utf-8")) for script in scripts]
    ours = [name for name in sorted(os.environ) if name.startswith("SBATCH_")]
    if left_out := [name for name in ours if not all(name in variables for variables in kept)]:
        say(f"Not handed on to sbatch, since the batch scripts go before them: {', '.join(left_out)}.")


def _ask_for_refusals(request: Request, parts: Sequence[Part]) -> None:
    """Let the cluster look at every script before the first one is queued.

    Raises:
        L0MoEError: it refuses one.
    """
    for part in parts:
        if part.submit:
            script = sbatch.place_of(request.run).script(part.spec.name)
            slurm_commands.check(script, _array_options(_array(request, part)))


def _submit(
    request: Request, parts: Sequence[Part], before: tuple[str, ...], record: Record, say: Say
) -> None:
    run = request.run
    record.recipe_file, record.cluster_file = str(run.recipe_file), str(request.cluster_file)
    replaced = [task for part in parts for task in part.replaced]
    slurm_commands.cancel(replaced)
    record.cancelled += replaced
    fresh: list[SubmittedJob] = []
    try:
        for part in parts:
            queued = part.queued
            if part.submit:
                job = _submit_part(request, part, before)
                fresh.append(job)
                record.jobs.append(job)
                write_record(run, record)
                say(_line(job))
                queued = (*queued, job.job)
            elif not part.done:
                say(f"{part.spec.name:<9} is queued already: {_short(part.queued)}")
            before = queued or before
    except BaseException as error:
        _take_back(run, record, fresh, error)
        raise
    say(f"Look at it with `l0moe status {run.folder}`, end it with `l0moe cancel {run.folder}`.")


def _submit_part(request: Request, part: Part, before: tuple[str, ...]) -> SubmittedJob:
    run, name = request.run, part.spec.name
    place, need = sbatch.place_of(run), resources(name, run.recipe, request.cluster)
    array = _array(request, part)
    options = _array_options(array)
    if before:
        options.append(f"--dependency=afterok:{':'.join(before)}")
    number = slurm_commands.submit(place.script(name), options)
    return SubmittedJob(
        stage=name,
        job=number,
        submitted=now(),
        after=list(before),
        script=str(place.script(name)),
        log=str(place.log(name)),
        array=array,
        nodes=need.nodes,
        gpus=need.all_gpus,
    )


def _array(request: Request, part: Part) -> str | None:
    """Return the experts to do, as sbatch's --array takes them; None for a stage of one job."""
    if part.spec.name != "experts":
        return None
    return sbatch.array_text(list(part.submit), experts_at_once(request.run.recipe, request.cluster))


def _array_options(array: str | None) -> list[str]:
    return [f"--array={array}"] if array else []


def _take_back(run: Run, record: Record, fresh: Sequence[SubmittedJob], error: BaseException) -> None:
    """Cancel what this command has queued before it failed, and say so."""
    if not fresh:
        return
    numbers = [job.job for job in reversed(fresh)]
    names = ", ".join(f"{job.stage} {job.job}" for job in fresh)
    try:
        slurm_commands.cancel(numbers)
    except L0MoEError as second:
        raise L0MoEError(
            f"{error} The jobs that were queued before it ({names}) could not be cancelled: {second}"
        ) from error
    record.cancelled += numbers
    write_record(run, record)
    if isinstance(error, L0MoEError):
        raise L0MoEError(
            f"{str(error).rstrip('.')}; the jobs queued before it ({names}) were cancelled."
        ) from error
    logger.warning("The jobs queued before (%s) were cancelled.", names)


def _nothing_to_do(run: Run, parts: Sequence[Part]) -> str:
    waiting = [task for part in parts for task in part.queued]
    if not waiting:
        return f"All of {run.folder} is done; nothing was submitted."
    return (
        f"What is missing is queued already ({_short(waiting)}); nothing was submitted. See `l0moe status "
        f"{run.folder}`."
    )


def _short(tasks: Sequence[str]) -> str:
    names = list(dict.fromkeys(task.partition("_")[0] for task in tasks))
    return f"job {names[0]}" if len(names) == 1 else f"jobs {', '.join(names)}"


def _line(job: SubmittedJob) -> str:
    after = list(dict.fromkeys(task.partition("_")[0] for task in job.after))
    gpus = f", {job.gpus} GPUs" if job.gpus else ""
    return (
        f"{job.stage:<9} job {job.job}{f' [{job.array}]' if job.array else ''}: {job.nodes} node(s){gpus}"
        f"{f', after {", ".join(after)}' if after else ''}"
    )

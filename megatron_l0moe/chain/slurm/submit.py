"""`l0moe run RECIPE --launcher slurm`: the whole chain as jobs, each after the one before it has succeeded.

What is done stays, what is queued stays, and the rest is submitted. `runs/NAME/slurm/jobs.json` says which jobs were
submitted for a run, so that status, cancel and a rerun find them.
"""

import datetime
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_l0moe.chain.preflight import check_cluster, check_files, check_memory
from megatron_l0moe.chain.slurm import sbatch
from megatron_l0moe.chain.slurm.cluster import Cluster, experts_at_once, resources
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs import slurm_commands
from megatron_l0moe.runs.caller_environment import for_slurm
from megatron_l0moe.runs.lock import locked
from megatron_l0moe.runs.slurm_commands import JobState, parse_array
from megatron_l0moe.runs.stage_folder import MARKER, check_started, is_done, write_json, write_text
from megatron_l0moe.runs.stages import Place, Run, StageSpec, chain, place_of, spec_of, stages
from megatron_l0moe.sizes.architecture import Architecture

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SubmittedJob:
    """One call of sbatch."""

    stage: str
    job: str
    """Its number."""
    submitted: str
    """When, ISO 8601, UTC."""
    after: list[str]
    """Jobs, or tasks of arrays, that have to succeed before."""
    script: str
    log: str
    """The file of the log, with Slurm's placeholders."""
    array: str | None
    """Experts, as sbatch's --array takes them; None: no array."""
    nodes: int
    gpus: int
    """The GPUs of the job, or of each task of an array."""

    @property
    def tasks(self) -> dict[str, int | None]:
        """Names that Slurm gives to what runs, and the expert of each."""
        if self.array is None:
            return {self.job: None}
        return {f"{self.job}_{k}": k for k in parse_array(self.array)}

    def log_of(self, task: str) -> Path:
        """Return the log of one of the tasks."""
        job, _, index = task.partition("_")
        return Path(self.log.replace("%A", job).replace("%a", index).replace("%j", job))


@dataclass
class RunJobs:
    """All jobs of a run."""

    recipe_file: str = ""
    cluster_file: str = ""
    jobs: list[SubmittedJob] = field(default_factory=list)
    """The jobs in the order of submission; of two for the same work the later one counts."""
    cancelled: list[str] = field(default_factory=list)
    """Numbers of jobs that a command of ours has ended."""

    def of_stage(self, name: str) -> list[SubmittedJob]:
        """Return the jobs of a stage, oldest first."""
        return [job for job in self.jobs if job.stage == name]


def record_file(run_folder: Path) -> Path:
    """Return the file of a run."""
    return run_folder / "slurm" / "jobs.json"


def read_record(run_folder: Path) -> RunJobs:
    """Return the jobs of a run; none where nothing was submitted."""
    path = record_file(run_folder)
    if not path.is_file():
        return RunJobs()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return RunJobs(**{**value, "jobs": [SubmittedJob(**job) for job in value["jobs"]]})
    except (ValueError, TypeError, KeyError) as error:
        raise L0MoEError(
            f"{path} cannot be read ({error}); cancel its jobs by hand and remove it."
        ) from error


def write_record(run: Run, record: RunJobs) -> None:
    """Write the jobs of a run."""
    write_json(record_file(run.folder), asdict(record))


def now() -> str:
    """Return the time in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class PendingStage:
    """What has to be done about one stage."""

    spec: StageSpec
    submit: tuple[int, ...]
    """Folders of the stage that need a job: the experts' numbers, or 0 for the only one."""
    queued: tuple[str, ...] = ()
    """Jobs, or tasks of arrays, that will do the rest."""
    replaced: tuple[str, ...] = ()
    """Waiting jobs to cancel: they wait for a job that is made anew."""

    @property
    def done(self) -> bool:
        """Whether nothing is left to do or to wait for."""
        return not self.submit and not self.queued


def missing_parts(
    run: Run, selected: Sequence[StageSpec], record: RunJobs, known: Mapping[str, JobState]
) -> list[PendingStage]:
    """Return what is to be done about each stage, in the chain's order.

    Args:
        known: what Slurm says of the jobs in the record.

    Raises:
        L0MoEError: a folder holds another recipe's work, or a stage before the first one is neither done nor queued.
    """
    parts: list[PendingStage] = []
    anew = False
    for spec in selected:
        part = _part(run, spec, record, known)
        if anew and part.queued:
            part = _replace(part, known)
        anew = anew or bool(part.submit)
        parts.append(part)
    _check_inputs(run, selected, record, known)
    return parts


def earlier_jobs(
    run: Run, selected: Sequence[StageSpec], record: RunJobs, known: Mapping[str, JobState]
) -> tuple[str, ...]:
    """Return queued jobs of stages before the first selected one, which it has to wait for."""
    rows = chain(run.recipe.method)
    before = rows[: rows.index(selected[0])]
    return tuple(task for spec in before for task in _part(run, spec, record, known).queued)


def alive_tasks(record: RunJobs, name: str, known: Mapping[str, JobState]) -> dict[int, str]:
    """Return the jobs of a stage that will still do something, by the number of their folder."""
    return {
        k or 0: task
        for job in record.of_stage(name)
        for task, k in job.tasks.items()
        if task in known and known[task].alive
    }


def _part(run: Run, spec: StageSpec, record: RunJobs, known: Mapping[str, JobState]) -> PendingStage:
    wanted = stages(run, spec.name)
    missing = [k for k, stage in enumerate(wanted) if not is_done(stage)]
    if spec.restart == "resume":
        for k in missing:
            if all((folder / MARKER).is_file() for folder in wanted[k].inputs):
                check_started(wanted[k])
    alive = alive_tasks(record, spec.name, known)
    return PendingStage(
        spec=spec,
        submit=tuple(k for k in missing if k not in alive),
        queued=tuple(alive[k] for k in missing if k in alive),
    )


def _replace(part: PendingStage, known: Mapping[str, JobState]) -> PendingStage:
    for task in part.queued:
        if known[task].state != "PENDING":
            raise L0MoEError(
                f"Job {task} of stage {part.spec.name} is {known[task].state} although a stage before it has to be "
                "done again; end the run's jobs with `l0moe cancel` first."
            )
    waiting = {int(task.partition("_")[2] or 0) for task in part.queued}
    return PendingStage(spec=part.spec, submit=tuple(sorted({*part.submit, *waiting})), replaced=part.queued)


def _check_inputs(
    run: Run, selected: Sequence[StageSpec], record: RunJobs, known: Mapping[str, JobState]
) -> None:
    ours = {spec.name for spec in selected}
    for spec in selected:
        for name in spec.inputs:
            if name not in ours and _part(run, spec_of(name, run.recipe.method), record, known).submit:
                raise L0MoEError(
                    f"The stage {spec.name} needs {name}, which is neither done nor queued; start with --from {name}."
                )


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
    """Refuse to work on a run here while jobs of it wait or run on a cluster."""
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
    """End all jobs of a run that still wait or run; returns them."""
    with locked(run_folder / "slurm"):
        record = read_record(run_folder)
        numbers = list(dict.fromkeys(job.job for job in record.jobs))
        alive = [state.job for state in slurm_commands.states(numbers).values() if state.alive]
        wanted = list(dict.fromkeys(job.partition("_")[0] for job in alive))
        # the last stage first, so that no job starts because the one before it went away
        slurm_commands.cancel(wanted[::-1])
        return wanted


def write_scripts(request: Request, architecture: Architecture, place: Place, names: Sequence[str]) -> None:
    """Write the batch scripts of some stages."""
    for name in names:
        text = sbatch.render(request.run, architecture, request.cluster, name, place)
        write_text(place.script(name), text)


def _write_scripts(request: Request, parts: Sequence[PendingStage]) -> None:
    run, place = request.run, place_of(request.run)
    place.logs.mkdir(parents=True, exist_ok=True)
    write_json(run.folder / "recipe.json", run.recipe.model_dump())
    write_json(place.scripts / "cluster.json", json.loads(request.cluster.model_dump_json()))
    architecture = Architecture.from_hf(Path(run.recipe.model.path))
    write_scripts(request, architecture, place, [part.spec.name for part in parts if part.submit])


def _say_what_is_left_out(request: Request, parts: Sequence[PendingStage], say: Say) -> None:
    """Name the variables of sbatch that the cluster file goes before."""
    scripts = [place_of(request.run).script(part.spec.name) for part in parts if part.submit]
    kept = [for_slurm(os.environ, script.read_text(encoding="utf-8")) for script in scripts]
    ours = [name for name in sorted(os.environ) if name.startswith("SBATCH_")]
    if left_out := [name for name in ours if not all(name in variables for variables in kept)]:
        say(f"Not handed on to sbatch, since the batch scripts go before them: {', '.join(left_out)}.")


def _ask_for_refusals(request: Request, parts: Sequence[PendingStage]) -> None:
    """Let the cluster look at every script before the first one is queued."""
    for part in parts:
        if part.submit:
            script = place_of(request.run).script(part.spec.name)
            slurm_commands.check(script, _array_options(_array(request, part)))


def _submit(
    request: Request, parts: Sequence[PendingStage], before: tuple[str, ...], record: RunJobs, say: Say
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


def _submit_part(request: Request, part: PendingStage, before: tuple[str, ...]) -> SubmittedJob:
    run, name = request.run, part.spec.name
    place, need = place_of(run), resources(name, run.recipe, request.cluster)
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


def _array(request: Request, part: PendingStage) -> str | None:
    """Return the experts to do, as sbatch's --array takes them; None for a stage of one job."""
    if part.spec.name != "experts":
        return None
    return sbatch.array_text(list(part.submit), experts_at_once(request.run.recipe, request.cluster))


def _array_options(array: str | None) -> list[str]:
    return [f"--array={array}"] if array else []


def _take_back(run: Run, record: RunJobs, fresh: Sequence[SubmittedJob], error: BaseException) -> None:
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


def _nothing_to_do(run: Run, parts: Sequence[PendingStage]) -> str:
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

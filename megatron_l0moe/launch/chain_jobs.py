"""Which jobs a run still needs: what is done stays, what is queued stays, and the rest is to be submitted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.launch.slurm_record import Record
from megatron_l0moe.launch.stages import Run, StageSpec, chain, spec_of, stages
from megatron_l0moe.runs.slurm_commands import JobState
from megatron_l0moe.runs.stage_folder import MARKER, check_started, is_done


@dataclass(frozen=True, kw_only=True)
class Part:
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
    run: Run, selected: Sequence[StageSpec], record: Record, known: Mapping[str, JobState]
) -> list[Part]:
    """Return what is to be done about each stage, in the chain's order.

    Args:
        known: what Slurm says of the jobs in the record.

    Raises:
        L0MoEError: a folder holds another recipe's work, or a stage before the first one is neither done nor queued.
    """
    parts: list[Part] = []
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
    run: Run, selected: Sequence[StageSpec], record: Record, known: Mapping[str, JobState]
) -> tuple[str, ...]:
    """Return queued jobs of stages before the first selected one, which it has to wait for."""
    rows = chain(run.recipe.method)
    before = rows[: rows.index(selected[0])]
    return tuple(task for spec in before for task in _part(run, spec, record, known).queued)


def alive_tasks(record: Record, name: str, known: Mapping[str, JobState]) -> dict[int, str]:
    """Return the jobs of a stage that will still do something, by the number of their folder."""
    return {
        k or 0: task
        for job in record.of_stage(name)
        for task, k in job.tasks.items()
        if task in known and known[task].alive
    }


def _part(run: Run, spec: StageSpec, record: Record, known: Mapping[str, JobState]) -> Part:
    wanted = stages(run, spec.name)
    missing = [k for k, stage in enumerate(wanted) if not is_done(stage)]
    if spec.restart == "resume":
        for k in missing:
            if all((folder / MARKER).is_file() for folder in wanted[k].inputs):
                check_started(wanted[k])
    alive = alive_tasks(record, spec.name, known)
    return Part(
        spec=spec,
        submit=tuple(k for k in missing if k not in alive),
        queued=tuple(alive[k] for k in missing if k in alive),
    )


def _replace(part: Part, known: Mapping[str, JobState]) -> Part:
    for task in part.queued:
        if known[task].state != "PENDING":
            raise L0MoEError(
                f"Job {task} of stage {part.spec.name} is {known[task].state} although a stage before it has to be "
                "done again; end the run's jobs with `l0moe cancel` first."
            )
    waiting = {int(task.partition("_")[2] or 0) for task in part.queued}
    return Part(spec=part.spec, submit=tuple(sorted({*part.submit, *waiting})), replaced=part.queued)


def _check_inputs(
    run: Run, selected: Sequence[StageSpec], record: Record, known: Mapping[str, JobState]
) -> None:
    ours = {spec.name for spec in selected}
    for spec in selected:
        for name in spec.inputs:
            if name not in ours and _part(run, spec_of(name, run.recipe.method), record, known).submit:
                raise L0MoEError(
                    f"The stage {spec.name} needs {name}, which is neither done nor queued; start with --from {name}."
                )

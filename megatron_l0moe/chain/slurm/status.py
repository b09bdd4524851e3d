"""`l0moe status RUN`: where each stage and each expert of a run is, and why something failed and where its log is.

Told from its folders, from Slurm where it answers, and from the logs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from megatron_l0moe.chain import progress as estimate
from megatron_l0moe.chain.progress import last_message
from megatron_l0moe.chain.slurm.submit import RunJobs, SubmittedJob, read_record
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.recipe import Recipe
from megatron_l0moe.runs import slurm_commands
from megatron_l0moe.runs.child_process import reason
from megatron_l0moe.runs.slurm_commands import JobState, SlurmUnreachableError
from megatron_l0moe.runs.stage_folder import MARKER
from megatron_l0moe.runs.stages import TRAINING, Run, chain, folders
from megatron_l0moe.runs.training_end import read_failure
from megatron_l0moe.runtime.json_files import read_json

WORDS = {
    "PENDING": "waiting",
    "NODE_FAIL": "node failed",
    "OUT_OF_MEMORY": "out of memory",
    "TIMEOUT": "time limit",
}
"""Slurm's states in other words than Slurm's own, in small letters."""
AFTER_A_FAILURE = "a stage before it failed"
FORGOTTEN = "Slurm has forgotten it, and it wrote no log"
WAITS = {
    "Dependency": "for the stage before",
    "DependencyNeverSatisfied": AFTER_A_FAILURE,
    "Resources": "for free nodes",
    "Priority": "for jobs of higher priority",
    "JobArrayTaskLimit": "for other experts (experts_at_once)",
    "BeginTime": "until Slurm starts it again",
}
GOOD_ENDS = ("done", "waiting", "running", "not submitted", "unknown")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    stage: str
    expert: int | None
    """The expert's number in the stage `experts`; None elsewhere."""
    job: str
    state: str
    restarts: int | None
    progress: str
    loss: float | None
    note: str
    """Why it waits, or failed."""
    log: Path | None

    @property
    def bad(self) -> bool:
        """Whether it ended without being done, and not because of a stage before it."""
        return self.state not in GOOD_ENDS and self.note not in (AFTER_A_FAILURE, FORGOTTEN)


def rows(run: Run, record: RunJobs, known: Mapping[str, JobState] | None) -> list[Row]:
    """Return a line for each stage and each expert.

    Args:
        known: what Slurm says; None: it does not answer.
    """
    return [
        _row(run, spec.name, k, folder, record, known)
        for spec in chain(run.recipe.method)
        for k, folder in enumerate(folders(run, spec.name))
    ]


def counts(lines: Sequence[Row]) -> str:
    """Return how many lines are in each state: `60 done, 3 running, 1 failed`."""
    found: dict[str, int] = {}
    for line in lines:
        found[line.state] = found.get(line.state, 0) + 1
    return ", ".join(f"{number} {state}" for state, number in found.items())


def _row(
    run: Run, name: str, k: int, folder: Path, record: RunJobs, known: Mapping[str, JobState] | None
) -> Row:
    found = _latest(record, name, k)
    task, log = (found[1], found[0].log_of(found[1])) if found else ("", None)
    job = (known or {}).get(task)
    state = _state(folder, task, job, record, asked=known is not None)
    training = None
    if name in TRAINING:
        steps = run.recipe.moe_steps if name == "moe" else run.recipe.expert_steps
        training = estimate.training(folder, steps)
    row = Row(
        stage=name,
        expert=k if name == "experts" else None,
        job=task,
        state=state,
        restarts=job.restarts if job else None,
        progress=_progress(run, name, state, training, log),
        loss=training.loss if training else None,
        note="",
        log=log if log and log.is_file() else None,
    )
    return Row(**{**row.__dict__, "note": _note(row, folder, job)})


def _latest(record: RunJobs, name: str, k: int) -> tuple[SubmittedJob, str] | None:
    """Return the job that was last submitted for a folder, and what Slurm calls it."""
    for job in reversed(record.of_stage(name)):
        for task, expert in job.tasks.items():
            if expert in (None, k):
                return job, task
    return None


def _state(folder: Path, task: str, job: JobState | None, record: RunJobs, *, asked: bool) -> str:
    if (folder / MARKER).is_file():
        return "done"
    if not task:
        return "not submitted"
    if job is None:
        if task.partition("_")[0] in record.cancelled or task in record.cancelled:
            return "cancelled"
        return "ended" if asked else "unknown"
    if job.state == "COMPLETED":
        return "ended"  # without the marker
    return WORDS.get(job.state, job.state.lower())


def _progress(run: Run, name: str, state: str, training: estimate.Training | None, log: Path | None) -> str:
    if training is not None:
        if training.seconds_per_step is None:
            return "starting" if state == "running" else ""
        pace = "" if state == "done" else f", {training.seconds_per_step:.2f} s a step"
        return f"step {training.done} of {training.steps}{pace}"
    return last_message(log) if state == "running" and log else ""


def _note(row: Row, folder: Path, job: JobState | None) -> str:
    if job and (row.state == "waiting" or job.reason == "DependencyNeverSatisfied"):
        return WAITS.get(job.reason, job.reason)
    if not row.bad:
        return ""
    try:
        failure = read_failure(folder)
    except L0MoEError as damaged:
        return str(damaged)
    if failure is not None:
        return failure.sentence
    if row.log is None:
        return "it wrote no log" if job else FORGOTTEN
    return reason(row.log)


def show(folder: Path, console: Console) -> None:
    """Print the state of a run."""
    record = read_record(folder)
    run = Run(
        recipe=_recipe(folder), recipe_file=Path(record.recipe_file or "recipe.yaml"), runs_dir=folder.parent
    )
    known: Mapping[str, JobState] | None = None
    problem = ""
    try:
        known = slurm_commands.states(dict.fromkeys(job.job for job in record.jobs))
    except SlurmUnreachableError as error:
        problem = str(error)
    lines = rows(run, record, known)
    console.print(_table(lines))
    if problem:
        console.print(f"{problem} Shown is what the files say.", soft_wrap=True, markup=False)
    for line in lines:
        if line.bad:
            console.print(_failure(line), soft_wrap=True, markup=False)


def _table(lines: list[Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("stage", "job", "state"):
        table.add_column(name, no_wrap=True)
    table.add_column("restarts", justify="right")
    table.add_column("progress")
    table.add_column("loss", justify="right")
    table.add_column("why")
    experts = [line for line in lines if line.stage == "experts"]
    for line in lines:
        if line.expert == 0:
            table.add_row("experts", "", counts(experts))
        table.add_row(
            f"  {line.expert:03d}" if line.expert is not None else line.stage,
            line.job,
            line.state,
            str(line.restarts) if line.restarts else "",
            line.progress,
            "" if line.loss is None else f"{line.loss:.4f}",
            "" if line.bad else line.note,
        )
    return table


def _failure(line: Row) -> str:
    name = f"expert {line.expert:03d}" if line.expert is not None else line.stage
    log = f" Its log is {line.log}." if line.log else ""
    return f"{name} ({line.state}): {line.note.rstrip('.')}.{log}"


def _recipe(folder: Path) -> Recipe:
    file = folder / "recipe.json"
    try:
        return Recipe.model_validate(read_json(file, "give the folder of a run"))
    except ValidationError as error:
        raise L0MoEError(f"{file} is no recipe that this version wrote; give the folder of a run.") from error

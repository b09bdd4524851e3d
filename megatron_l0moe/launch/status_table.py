"""`l0moe status RUN`: the table, and below it why something failed and where its log is."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.launch.slurm_record import read_record
from megatron_l0moe.launch.slurm_status import Row, counts, rows
from megatron_l0moe.launch.stages import Run
from megatron_l0moe.recipe.recipe import Recipe
from megatron_l0moe.runs import slurm_commands
from megatron_l0moe.runs.slurm_commands import JobState, SlurmUnreachableError
from megatron_l0moe.runtime.json_files import read_json


def show(folder: Path, console: Console) -> None:
    """Print the state of a run.

    Raises:
        L0MoEError: the folder is not that of a run.
    """
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

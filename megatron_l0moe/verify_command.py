"""`l0moe verify RUN`. Everything heavy is imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_l0moe.command_errors import one_sentence
from megatron_l0moe.errors import L0MoEError, nearest

RunFolder = Annotated[
    str, typer.Argument(metavar="RUN", help="Name of a run, or its folder.", show_default=False)
]
RunsDir = Annotated[Path, typer.Option("--runs-dir", metavar="DIR", help="Folder that holds the runs.")]
EXIT_DIFFERS = 1


def verify(run: RunFolder, runs_dir: RunsDir = Path("runs")) -> None:
    """Compare every file of a run's finished stages, and the dense model, with what was recorded; reads all of them."""
    with one_sentence(runs_dir):
        from rich.console import Console

        from megatron_l0moe.chain.provenance import table, verify_run

        checked = verify_run(_folder_with_stages(run, runs_dir))
        Console(highlight=False).print(table(checked))
        problems = [problem for one in checked for problem in one.problems]
        for problem in problems:
            typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(EXIT_DIFFERS)


def _folder_with_stages(run: str, runs_dir: Path) -> Path:
    from megatron_l0moe.chain.provenance import stage_folders

    for folder in (runs_dir / run, Path(run)):
        if folder.is_dir() and stage_folders(folder):
            return folder
    known = [folder.name for folder in runs_dir.glob("*") if folder.is_dir()]
    raise L0MoEError(
        f"There is no run {run!r} in {runs_dir}{nearest(run, known)}, or none of its stages is finished; give the name "
        "of a run or its folder."
    )

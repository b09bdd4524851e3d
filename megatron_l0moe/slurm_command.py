"""`l0moe run --launcher slurm`, `l0moe status` and `l0moe cancel`. Everything else is imported when it runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_l0moe.command_errors import one_sentence
from megatron_l0moe.errors import L0MoEError, nearest

if TYPE_CHECKING:
    from megatron_l0moe.chain.stages import Run, StageSpec

RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="Name of a run, or its folder.", show_default=False)
]
RunsDir = Annotated[Path, typer.Option("--runs-dir", metavar="DIR", help="Folder that holds the runs.")]


FILE_WIDTH = 160
"""Columns of the table when it goes to a file."""
LAUNCHERS = ("local", "slurm")


def chosen(launcher: str, cluster_file: Path | None) -> bool:
    """Say whether a run goes to Slurm.

    Raises:
        L0MoEError: there is no such launcher, or a cluster file was given for a run on this machine.
    """
    if launcher not in LAUNCHERS:
        raise L0MoEError(
            f"There is no launcher {launcher!r}{nearest(launcher, LAUNCHERS)}; known are {', '.join(LAUNCHERS)}."
        )
    if launcher == "local" and cluster_file is not None:
        raise L0MoEError(
            f"--cluster {cluster_file} means nothing without --launcher slurm; add it, or leave both out."
        )
    return launcher == "slurm"


def run_on_slurm(
    run: "Run", selected: "tuple[StageSpec, ...]", cluster_file: Path | None, *, dry_run: bool
) -> None:
    """Submit a run, or show what would be submitted."""
    from megatron_l0moe.chain import dry_run as slurm_dryrun
    from megatron_l0moe.chain import machine
    from megatron_l0moe.chain.slurm.cluster import load_cluster
    from megatron_l0moe.chain.slurm.submit import Request, submit_chain

    if cluster_file is None:
        raise L0MoEError(
            "--launcher slurm needs --cluster FILE; see slurm/clusters/ for files to start from."
        )
    cluster = load_cluster(cluster_file)
    run, _ = machine.settle(run, on_gpus=cluster.gpus_per_node > 0, keep=not dry_run)
    request = Request(run=run, selected=selected, cluster=cluster, cluster_file=cluster_file)
    if dry_run:
        slurm_dryrun.show_jobs(request, typer.echo)
    else:
        submit_chain(request, typer.echo)


def cancel(run: RunName, runs_dir: RunsDir = Path("runs")) -> None:
    """End all Slurm jobs of a run; what is done stays, and `l0moe run` goes on with the rest."""
    with one_sentence(runs_dir):
        from megatron_l0moe.chain.slurm.submit import cancel_run

        folder = _folder(run, runs_dir)
        ended = cancel_run(folder)
        typer.echo(f"Cancelled: {', '.join(ended)}." if ended else f"No job of {folder} waits or runs.")


def refuse_if_queued(run: "Run") -> None:
    """Refuse to do a run here whose jobs are queued on a cluster."""
    if (run.folder / "slurm" / "jobs.json").is_file():
        from megatron_l0moe.chain.slurm import submit

        submit.refuse_if_queued(run)


def status(run: RunName, runs_dir: RunsDir = Path("runs")) -> None:
    """Show where each stage and each expert of a run is, and why something failed."""
    with one_sentence(runs_dir):
        from rich.console import Console

        from megatron_l0moe.chain.slurm.status import show

        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = FILE_WIDTH
        show(_folder(run, runs_dir), console)


def _folder(run: str, runs_dir: Path) -> Path:
    for folder in (runs_dir / run, Path(run)):
        if (folder / "recipe.json").is_file():
            return folder
    known = [file.parent.name for file in runs_dir.glob("*/recipe.json")]
    raise L0MoEError(
        f"There is no run {run!r} in {runs_dir}{nearest(run, known)}; give the name of a run or its folder."
    )

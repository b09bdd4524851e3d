"""The `l0moe` command. Everything heavy is imported inside the command that needs it."""

import functools
import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

import megatron_l0moe
from megatron_l0moe import commands
from megatron_l0moe.commands import RunsDir, one_sentence
from megatron_l0moe.recipe.recipe import load_recipe
from megatron_l0moe.runs import caller_environment
from megatron_l0moe.runs.caller_environment import VERBOSE
from megatron_l0moe.runs.stages import CHAIN, STAGE_NAMES, Run, StageSpec, selection

HELP = """Turn a pretrained dense LLM (Llama, Mistral, Qwen2) into an L0-MoE that is served like any other model.

One recipe file describes a whole run. Start with `l0moe run examples/quickstart.yaml`: it does every stage that
is not done yet, so the same command goes on after an interruption. `--dry-run` shows what would happen.

The stages, in order: {stages}; a recipe with another
method has no experts and no assemble. Results lie in runs/NAME/STAGE/; remove such a folder to do the stage again.
"""

app = typer.Typer(
    help=HELP.format(stages=", ".join(STAGE_NAMES)),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
ONE_STAGE = "One stage of a run"

RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML), see examples/.", show_default=False)
]
Phase = Annotated[
    str | None,
    typer.Option(
        "--phase", metavar="PHASE", help="prepare or finish: what a batch job does around the training."
    ),
]
Index = Annotated[
    int | None, typer.Option("--index", metavar="K", help="Train this expert only, counted from 0.")
]
NoVerify = Annotated[
    bool,
    typer.Option("--no-verify", help="Do not compare the files of the stages before with their manifests."),
]


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", help="Show the warnings of other libraries too, before the command's name."
        ),
    ] = False,
) -> None:
    if verbose:
        os.environ[VERBOSE] = "1"
    if version:
        typer.echo(megatron_l0moe.__version__)
        raise typer.Exit


@app.command()
def run(
    recipe: RecipePath,
    first: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE", help="Start here; the stages before must be done."),
    ] = None,
    last: Annotated[
        str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print inputs, outputs, shapes, tokens, steps and commands; do nothing."
        ),
    ] = False,
    launcher: Annotated[
        str, typer.Option("--launcher", metavar="NAME", help="local: here, stage by stage; slurm: as jobs.")
    ] = "local",
    cluster: Annotated[
        Path | None,
        typer.Option("--cluster", metavar="FILE", help="Settings of the Slurm cluster, see slurm/clusters/."),
    ] = None,
    no_verify: NoVerify = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Do a whole run: every stage that is not done yet, in order."""
    with one_sentence(runs_dir):
        from megatron_l0moe.chain import dry_run as dryrun
        from megatron_l0moe.chain import run_local

        this = _load(recipe, runs_dir, verify=not no_verify)
        selected = selection(this.recipe.method, first, last)
        if commands.chosen(launcher, cluster):
            commands.run_on_slurm(this, selected, cluster, dry_run=dry_run)
        elif dry_run:
            typer.echo("\n".join(dryrun.describe(this, selected)))
        else:
            commands.refuse_if_queued(this)
            run_local.run_chain(this, first=first, last=last)


app.command()(commands.plan)
app.command()(commands.status)
app.command()(commands.cancel)
app.command()(commands.verify)


def _add_stage(spec: StageSpec) -> None:
    """Add `l0moe STAGE RECIPE`; a stage that trains has the options that a batch job gives it."""

    def stage(recipe: RecipePath, no_verify: NoVerify = False, runs_dir: RunsDir = Path("runs")) -> None:
        _stage(spec.name, recipe, runs_dir, verify=not no_verify)

    def training(
        recipe: RecipePath, phase: Phase = None, no_verify: NoVerify = False, runs_dir: RunsDir = Path("runs")
    ) -> None:
        _stage(spec.name, recipe, runs_dir, verify=not no_verify, phase=phase)

    def experts(
        recipe: RecipePath,
        index: Index = None,
        phase: Phase = None,
        no_verify: NoVerify = False,
        runs_dir: RunsDir = Path("runs"),
    ) -> None:
        _stage(spec.name, recipe, runs_dir, verify=not no_verify, only=index, phase=phase)

    command = experts if spec.by_expert else training if spec.trains else stage
    app.command(spec.name, rich_help_panel=ONE_STAGE, help=spec.help)(command)


for _spec in CHAIN:
    _add_stage(_spec)


@app.command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="Folder of a curate stage, or of its run.", show_default=False),
    ],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Check every checksum, record and global batch; reads all tokens."),
    ] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer", metavar="PATH", help="Model folder or tokenizer file to decode samples with."
        ),
    ] = None,
    heads: Annotated[int, typer.Option("--heads", min=0, help="Samples to show of each domain.")] = 2,
) -> None:
    """Show what a curate folder holds, and verify it."""
    with one_sentence(path):
        from rich.console import Console

        _log_to_stderr()
        from megatron_l0moe.index import inspect as inspection

        folder = inspection.open_folder(path)
        known = inspection.find_tokenizer(folder, tokenizer)
        done = inspection.verify(folder) if verify else ""
        inspection.describe(folder, Console(), tokenizer=known, heads=heads)
        if done:
            typer.echo(done)


@app.command("bench")
@functools.wraps(commands.bench)
def _bench(**options: Any) -> None:
    with one_sentence(Path("runs")):
        _log_to_stderr()
        commands.bench(**options)


def _stage(
    name: str,
    recipe: Path,
    runs_dir: Path,
    *,
    verify: bool,
    only: int | None = None,
    phase: str | None = None,
) -> None:
    with one_sentence(runs_dir):
        from megatron_l0moe.chain.machine import begun
        from megatron_l0moe.chain.run_local import carry_out
        from megatron_l0moe.chain.stage_work import after_training, work_of

        this = _load(recipe, runs_dir, verify=verify)
        _log_to_stderr(this.log_file(name))
        this = begun(this)
        if phase is not None:
            from megatron_l0moe.chain.batch_phases import run_phase

            left = functools.partial(after_training, this)
            raise typer.Exit(run_phase(this, name, phase, left, index=only))
        carry_out(this, name, functools.partial(work_of(name), this), only=only)


def _load(recipe: Path, runs_dir: Path, *, verify: bool) -> Run:
    return Run(recipe=load_recipe(recipe), recipe_file=recipe, runs_dir=runs_dir, verify=verify)


def _log_to_stderr(log: Path | None = None) -> None:
    """Show our own messages, and of other libraries errors only; their warnings too where the output is a log.

    Args:
        log: file that takes the warnings that are not shown; None: they are dropped.
    """
    ours = logging.StreamHandler()
    ours.setFormatter(logging.Formatter("%(asctime)s | %(message)s", datefmt="%H:%M:%S"))
    handlers: list[logging.Handler] = [ours]
    if os.environ.get(VERBOSE) != "1":
        ours.addFilter(_is_ours_or_an_error)
        os.environ.setdefault("TQDM_DISABLE", "1")
        logging.captureWarnings(True)
        # torch gives its loggers a handler of their own, which no filter of ours sees
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(logging.FileHandler(log, encoding="utf-8", delay=True))
    logging.basicConfig(level=logging.WARNING, handlers=handlers)
    logging.getLogger("megatron_l0moe").setLevel(logging.INFO)


def _is_ours_or_an_error(record: logging.LogRecord) -> bool:
    return record.name.startswith("megatron_l0moe") or record.levelno >= logging.ERROR


def main() -> None:
    """Run the command line, in an environment without what would change what its processes do."""
    gone = caller_environment.replace(os.environ, caller_environment.for_our_processes(os.environ))
    if changing := [name for name in gone if caller_environment.OTHER_NUMBERS.fullmatch(name)]:
        typer.echo(f"Left out of the environment, since it changes numbers: {', '.join(changing)}.", err=True)
    app(prog_name="l0moe")

"""The commands beside `l0moe run` and its stages: plan, verify, bench, and those of a run on Slurm.

Everything heavy is imported when it runs. A command that cannot go on ends with one sentence on stderr and an exit
code, without a traceback.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_l0moe.errors import L0MoEError, nearest, sentence_of

if TYPE_CHECKING:
    from megatron_l0moe.runs.stages import Run, StageSpec


RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="Name of a run, or its folder.", show_default=False)
]
RunsDir = Annotated[Path, typer.Option("--runs-dir", metavar="DIR", help="Folder that holds the runs.")]
LAUNCHERS = ("local", "slurm")
MOST_GPUS = 2**17
"""As many as a recipe's `gpus` may be; a test compares the two."""
PIPE_WIDTH, FILE_WIDTH = 120, 160
"""Columns of a table that goes to no terminal: of `bench`, and of `status`."""
EXIT_DIFFERS = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


@contextlib.contextmanager
def one_sentence(runs_dir: Path) -> Iterator[None]:
    """End every problem that a user can solve with one sentence and an exit code, without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        _fail("Stopped; run the same command to go on.", EXIT_INTERRUPTED)
    except Exception as error:
        sentence = sentence_of(error, runs_dir)
        if sentence is None:
            raise
        _fail(sentence, EXIT_USER_ERROR)


def _fail(sentence: str, code: int) -> None:
    typer.echo(sentence, err=True)
    sys.stderr.flush()
    raise typer.Exit(code)


def bench(
    dense: Annotated[
        Path | None,
        typer.Option("--dense", metavar="DIR", help="Hugging Face checkpoint of the dense model."),
    ] = None,
    moe: Annotated[
        Path | None, typer.Option("--moe", metavar="DIR", help="Exported L0-MoE that was made of it.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            metavar="NAME",
            help="Random models with the proportions of llama-3-8b, mistral-7b or qwen2-7b instead.",
        ),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(help="Of the shape's widths; left out: the largest of 1, 1/2, 1/4, ... that fits."),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Of the shape; left out: all.")] = None,
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="DIR", help="Keep the random models here.")
    ] = None,
    heldout: Annotated[
        Path | None,
        typer.Option(
            "--heldout", metavar="FILE", help="curate/heldout.jsonl of the run; else random tokens."
        ),
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="transformers or vllm; may be repeated; left out: both.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="Threads of each matrix product.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Pairs that count; one more warms up.")] = 5,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Length of the prompts that are prefilled.")
    ] = 512,
    prefill_batch: Annotated[int, typer.Option(min=1, help="Prompts of one prefill.")] = 4,
    decode_tokens: Annotated[int, typer.Option(min=1, help="Steps of each decode.")] = 8,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also say which operations take the time.")
    ] = False,
    serve_python: Annotated[
        Path, typer.Option("--serve-python", metavar="FILE", help="Python of vLLM's environment.")
    ] = Path(".venv-serve/bin/python"),
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="The numbers; the table lies beside it as .md.")
    ] = Path("runs/bench.json"),
) -> None:
    """Time a dense model and its L0-MoE side by side, in transformers and in vLLM, beside what is possible."""
    from rich.console import Console

    from megatron_l0moe.evaluation.bench import bench as benchmark
    from megatron_l0moe.evaluation.bench.bench import markdown, rich_table
    from megatron_l0moe.evaluation.models import DTYPES
    from megatron_l0moe.runs.stage_folder import write_json, write_text

    if dtype not in DTYPES:
        raise L0MoEError(f"--dtype {dtype!r} is not known; use {' or '.join(DTYPES)}.")
    settings = benchmark.BenchSettings(
        engines=tuple(benchmark.parse_engine(name) for name in engine) if engine else benchmark.ENGINES,
        dtype=dtype,
        threads=threads,
        repeats=repeats,
        prompt_tokens=prompt_tokens,
        prefill_batch=prefill_batch,
        decode_tokens=decode_tokens,
        profile=profile,
        serve_python=serve_python,
    )
    with _models(dense, moe, shape, scale, layers, keep, dtype) as (folders, description):
        text = benchmark.text_for(folders[0], heldout, settings)
        result = benchmark.bench(*folders, text, settings)
    result["source"] = description
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    write_text(out.with_suffix(".md"), markdown(result))
    # A file or a pipe has no width; a narrow terminal folds the cells.
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(rich_table(result))
    typer.echo(f"Written to {out} and {out.with_suffix('.md')}.")


@contextlib.contextmanager
def _models(
    dense: Path | None,
    moe: Path | None,
    shape: str | None,
    scale: float | None,
    layers: int | None,
    keep: Path | None,
    dtype: str,
) -> Iterator[tuple[tuple[Path, Path], dict[str, object]]]:
    """Give the two folders, making random models if a shape is named, and what is to be said of them."""
    if shape is None:
        if dense is None or moe is None:
            raise L0MoEError("Give --dense and --moe, or --shape for random models.")
        yield (dense, moe), {"folders": [str(dense), str(moe)]}
        return
    if dense is not None or moe is not None:
        raise L0MoEError("--shape makes random models; leave --dense and --moe out, or --shape.")
    import psutil

    from megatron_l0moe.evaluation.bench import shapes

    published = shapes.find_shape(shape)
    if scale is None:
        scale = shapes.largest_scale(published, layers, dtype, psutil.virtual_memory().available)
    chosen = shapes.scaled(published, scale, layers)
    description: dict[str, object] = {"shape": shape, "scale": scale, "layers": chosen.dense.num_layers}
    with contextlib.ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="l0moe-shape-")))
        yield shapes.write_pair(chosen, folder, dtype=dtype), description


def verify(run: RunName, runs_dir: RunsDir = Path("runs")) -> None:
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


def plan(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML), see examples/.", show_default=False)
    ],
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus", metavar="N", min=1, max=MOST_GPUS, help="Propose layouts for N GPUs, fastest first."
        ),
    ] = None,
    gpu: Annotated[str, typer.Option("--gpu", metavar="NAME", help="h100, h200 or a100.")] = "h100",
    mfu: Annotated[
        float | None,
        typer.Option("--mfu", min=0.01, max=1.0, help="Model FLOPs utilisation that GPU-hours assume."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers here too.")
    ] = None,
) -> None:
    """Say what a recipe takes: parameters, FLOPs, memory, disk, GPU-hours; propose layouts. Nothing is run."""
    with one_sentence(json_file or Path()):
        from rich.console import Console

        from megatron_l0moe.plan.plan import make_plan
        from megatron_l0moe.plan.tables import as_json, show
        from megatron_l0moe.recipe.recipe import load_recipe
        from megatron_l0moe.sizes.gpu_models import find_gpu

        found = make_plan(load_recipe(recipe), gpu=find_gpu(gpu), gpus=gpus, mfu=mfu)
        show(found, Console())
        if json_file:
            json_file.write_text(json.dumps(as_json(found), indent=1) + "\n", encoding="utf-8")
        if problem := found.problem():
            raise problem


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

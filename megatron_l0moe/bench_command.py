"""The options of `l0moe bench`. Everything heavy is imported when it runs."""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from megatron_l0moe.errors import L0MoEError

PIPE_WIDTH = 120


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

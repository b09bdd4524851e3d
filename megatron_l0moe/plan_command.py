"""The options of `l0moe plan`. Everything else is imported when it runs."""

import json
from pathlib import Path
from typing import Annotated

import typer

from megatron_l0moe.command_errors import one_sentence

MOST_GPUS = 2**17
"""As many as a recipe's `gpus` may be; a test compares the two."""


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

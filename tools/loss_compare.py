#!/usr/bin/env python3
"""Train the same few steps in one process and in other parallel layouts, and compare losses and grad norms.

    python tools/loss_compare.py --recipe RECIPE --layouts "tp2,sp;ep2;pp2" [--stage expert|moe] [--steps 10]

Every layout runs `megatron_l0moe.training.pretrain` by torchrun with the recipe's own flags, in fp32, from the same
initial weights (runs/NAME/convert or assemble) on the same batches (runs/NAME/curate); only the layout differs. The
words of a layout are explained in docs/layouts.md. Exit code: 0 equal, 1 different, 2 bad input or a job that failed.
"""

import argparse
import dataclasses
import json
import math
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_l0moe.chain import preflight, training_commands
from megatron_l0moe.chain.machine import begun
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.layout import SIZES, Flag, Layout, parse_layouts
from megatron_l0moe.recipe.recipe import Section, layout_names, load_recipe
from megatron_l0moe.runs.child_process import run_command
from megatron_l0moe.runs.stage_folder import is_done, write_json, write_text
from megatron_l0moe.runs.stages import Run, stages
from megatron_l0moe.runtime.hardware import describe_machine, visible_gpus
from megatron_l0moe.sizes.architecture import Architecture, job_sizes

LOSS_TOLERANCE = 5e-6
"""Largest difference of a step's loss, in nats a token: ten times the largest that docs/layouts.md measured."""
GRAD_NORM_TOLERANCE = 5e-6
"""Largest difference of a step's grad norm, as a fraction of it; the largest measured was 1.8e-7."""
REASON = (
    "a layout changes the order in which fp32 numbers are added, which is worth about 1e-7 of a sum; Adam divides each "
    "gradient by its own size, so a weight whose gradient is mostly rounding takes other steps, and the difference "
    "grows with the steps"
)
STAGES: dict[str, tuple[Section, str, str]] = {
    "expert": ("expert_training", "convert", "expert_000"),
    "moe": ("moe_training", "assemble", "moe"),
}
"""Section of the recipe, stage that makes the initial weights, sample index."""


@dataclass(frozen=True)
class Series:
    """What one run of the steps gave."""

    name: str
    processes: int
    command: str
    seconds: float
    """Of the whole run, with its start."""
    losses: list[float]
    """Nats a token, by step."""
    grad_norms: list[float]
    """Of the weights, before the clip."""


@dataclass(frozen=True)
class Verdict:
    """How far a layout is from one process."""

    name: str
    loss: float
    """Largest difference over the steps, nats a token."""
    grad_norm: float
    """Largest difference over the steps, as a fraction of one process's."""
    is_equal: bool


def judge(one: Series, other: Series, loss_tolerance: float, grad_norm_tolerance: float) -> Verdict:
    """Compare a run with the run in one process; a number that is not finite counts as different."""
    loss = _largest(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))
    pairs = zip(one.grad_norms, other.grad_norms, strict=True)
    norm = _largest(abs(a - b) / max(a, 1e-12) for a, b in pairs)
    return Verdict(other.name, loss, norm, loss <= loss_tolerance and norm <= grad_norm_tolerance)


def _largest(differences: Iterable[float]) -> float:
    """Return the largest number, or infinity if one is NaN, which `max` would pass over."""
    return max(math.inf if math.isnan(difference) else difference for difference in differences)


def check_inputs(run: Run, stage: str, steps: int) -> Architecture:
    """Return the model's sizes; refuse a run folder without initial weights or data, and steps it has no data for."""
    section, weights, _ = STAGES[stage]
    if run.recipe.method != "l0moe":
        raise L0MoEError(
            f"loss_compare compares layouts of the stages of method l0moe, and {run.recipe_file} has method "
            f"{run.recipe.method}; give another recipe."
        )
    architecture = Architecture.from_hf(Path(run.recipe.model.path))
    preflight.check_sizes(run.recipe, architecture)
    for name in (weights, "curate"):
        if not all(is_done(part) for part in stages(run, name)):
            raise L0MoEError(
                f"The {stage} stage starts from {run.stage_folder(name)}, which is not there or not finished; run "
                f"`l0moe run {run.recipe_file} --until {name}` first."
            )
    most = run.recipe.expert_steps if section == "expert_training" else run.recipe.moe_steps
    if not 3 <= steps <= most:
        raise L0MoEError(
            f"--steps ({steps}) must lie between 3 and the {most} steps for which the recipe's data was cut."
        )
    return architecture


def check_layouts(run: Run, stage: str, architecture: Architecture, layouts: Sequence[Layout]) -> None:
    """Refuse layouts that cannot work with this model, this batch and this machine."""
    section = STAGES[stage][0]
    sizes = job_sizes(run.recipe, section, architecture)
    words = {field: word for word, field in SIZES.items()} | {
        "sequence": "sp",
        "pipeline_layers": "layersA+B",
    }
    names = {**layout_names(section), **words, "processes": "the number of processes"}
    for layout in layouts:
        try:
            preflight.check_gpus(layout, sizes, names, visible_gpus())
        except L0MoEError as error:
            raise L0MoEError(f"Layout {layout.text!r}: {error}") from error


def train(
    run: Run,
    stage: str,
    architecture: Architecture,
    layout: Layout,
    steps: int,
    out: Path,
    flags: Mapping[str, Flag] | None = None,
    name: str = "",
) -> Series:
    """Train the steps in one layout; logs and metrics go to a folder of the layout's name.

    Args:
        flags: Megatron's or our flags to change, for a control that must differ.
        name: of the folder and the series; the layout's text if empty.
    """
    name = name or layout.text
    folder = out / name
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    trial = training_commands.Trial(layout=layout, steps=steps, folder=folder, flags=flags or {})
    if stage == "expert":
        job = training_commands.expert_job(run, architecture, 0, trial=trial)
    else:
        job = training_commands.moe_job(run, architecture, trial=trial)
    start = time.monotonic()
    run_command(job.command, log=folder / "train.log", env=job.env)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    if [record["iteration"] for record in records] != list(range(1, steps + 1)):
        raise L0MoEError(
            f"Layout {name!r} wrote {len(records)} steps, not {steps}; see {folder / 'train.log'}."
        )
    return Series(
        name=name,
        processes=layout.processes,
        command=shlex.join(job.command),
        seconds=round(time.monotonic() - start, 1),
        losses=[float(record["lm_loss"]) for record in records],
        grad_norms=[float(record["grad_norm"]) for record in records],
    )


def tables(
    series: Sequence[Series], verdicts: Sequence[Verdict]
) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return (title, header, rows) of what is printed and written."""
    names = [one.name for one in series]
    numbers = [
        (title, ["step", *names], [[str(i + 1), *row] for i, row in enumerate(zip(*columns, strict=True))])
        for title, columns in (
            ("Loss, nats a token", [[f"{x:.8f}" for x in one.losses] for one in series]),
            ("Grad norm of the weights", [[f"{x:.8f}" for x in one.grad_norms] for one in series]),
        )
    ]
    rows = [
        [
            v.name,
            str(s.processes),
            f"{v.loss:.1e}",
            f"{v.grad_norm:.1e}",
            "equal" if v.is_equal else "DIFFERENT",
        ]
        for v, s in zip(verdicts, series[1:], strict=True)
    ]
    header = [
        "layout",
        "processes",
        "largest loss difference",
        "largest grad norm difference, relative",
        "verdict",
    ]
    return [*numbers, ("Against one process", header, rows)]


def markdown(
    title: str, notes: Sequence[str], parts: Sequence[tuple[str, list[str], list[list[str]]]]
) -> str:
    """Return the tables as a Markdown page."""
    lines = [f"# {title}", "", *notes]
    for name, header, rows in parts:
        lines += ["", f"## {name}", "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def compare(options: argparse.Namespace) -> bool:
    """Do it all; returns whether every layout equals one process."""
    run = begun(
        Run(recipe=load_recipe(options.recipe), recipe_file=options.recipe, runs_dir=options.runs_dir)
    )
    layouts = [layout for layout in parse_layouts(options.layouts) if layout != Layout()]
    architecture = check_inputs(run, options.stage, options.steps)
    check_layouts(run, options.stage, architecture, [Layout(), *layouts])
    out = options.out or run.folder / "loss_compare" / options.stage
    console = Console(width=None if sys.stdout.isatty() else 200)
    series: list[Series] = []
    for layout in (Layout(), *layouts):
        console.print(
            f"{layout.text}: {options.steps} steps in {layout.processes} process(es)", highlight=False
        )
        series.append(train(run, options.stage, architecture, layout, options.steps, out))
    limits = (options.loss_tolerance, options.grad_norm_tolerance)
    verdicts = [judge(series[0], other, *limits) for other in series[1:]]
    parts = tables(series, verdicts)
    for title, header, rows in parts:
        table = Table(*header, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    tolerance = f"Tolerance: {limits[0]:g} nats a token, {limits[1]:g} of the grad norm: {REASON}."
    console.print(tolerance, highlight=False)
    machine = describe_machine(
        device="cuda" if visible_gpus() else "cpu", threads=_threads(run, options.stage)
    )
    about = f"{options.stage} stage of {run.recipe.name}, {options.steps} steps, fp32"
    write_text(out / "loss_compare.md", markdown(f"Layouts against one process: {about}", [tolerance], parts))
    write_json(
        out / "loss_compare.json",
        {
            "recipe": str(options.recipe),
            "stage": options.stage,
            "steps": options.steps,
            "machine": machine,
            "tolerance": {"loss": limits[0], "grad_norm": limits[1], "reason": REASON},
            "series": [_finite(dataclasses.asdict(one)) for one in series],
            "verdicts": [_finite(dataclasses.asdict(one)) for one in verdicts],
        },
    )
    is_equal = all(verdict.is_equal for verdict in verdicts)
    console.print(f"{'Equal' if is_equal else 'DIFFERENT'}; written to {out}", highlight=False)
    return is_equal


def _threads(run: Run, stage: str) -> int:
    return run.recipe.parallel(STAGES[stage][0]).threads


def _finite(value: object) -> object:
    """Write infinities and NaN, which JSON lacks, as text."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Compare the losses of parallel layouts with those of one process."
    )
    parser.add_argument(
        "--recipe", type=Path, required=True, help="recipe whose run folder holds weights and data"
    )
    parser.add_argument("--layouts", required=True, help="such as 'tp2,sp;ep2;pp2', see docs/layouts.md")
    parser.add_argument("--stage", choices=sorted(STAGES), default="moe")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--out", type=Path, help="folder of the results; default runs/NAME/loss_compare/STAGE"
    )
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--loss-tolerance", type=float, default=LOSS_TOLERANCE)
    parser.add_argument("--grad-norm-tolerance", type=float, default=GRAD_NORM_TOLERANCE)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; returns the exit code."""
    try:
        return 0 if compare(parse(argv)) else 1
    except L0MoEError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""How far a run is and how long it will still take, from what was measured in this run and nothing else.

Before the first training step nothing is known and nothing is claimed. Then the median time of the last steps
gives the time of all training steps that are left; a stage that was not measured yet borrows the time per
token of one that was, weighted by what a token costs there. Stages without tokens (convert, assemble, export,
report) take seconds to minutes and are not counted, which is one reason why the display says "about".
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from megatron_l0moe.data.manifest import MARKER, read_manifest
from megatron_l0moe.launch.stages import Run

RECENT_STEPS = 20
TAIL_BYTES = 1 << 18
SHOWN = ("iteration", "seconds", "lm_loss")
"""What a row of metrics.jsonl is read for; one that holds something else there is damaged."""
EVALUATION_COST = 1.0
"""Held-out tokens pass three models forwards only, and a forward pass is a third of a training step."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Position of one training job."""

    done: int
    """Finished steps."""
    steps: int
    seconds_per_step: float | None
    """Median of the last steps; None before the first."""
    loss: float | None = None
    """Of the last step, nats a token."""


def training(folder: Path, steps: int) -> Training:
    """Read the position of a training job from its metrics.jsonl."""
    path = folder / "metrics.jsonl"
    rows = _tail(path) if path.is_file() else []
    times = [row["seconds"] for row in rows if isinstance(row.get("seconds"), int | float)][-RECENT_STEPS:]
    last = rows[-1].get("iteration", 0) if rows else 0
    done = steps if (folder / MARKER).is_file() else min(int(last), steps)
    return Training(
        done=done,
        steps=steps,
        seconds_per_step=statistics.median(times) if times else None,
        loss=rows[-1].get("lm_loss") if rows else None,
    )


def experts(run: Run) -> list[Training]:
    """Return the positions of the K expert runs."""
    steps = run.recipe.expert_steps
    return [training(run.expert_folder(k), steps) for k in range(run.recipe.model.num_experts)]


def moe(run: Run) -> Training:
    """Return the position of MoE training."""
    return training(run.stage_folder("moe"), run.recipe.moe_steps)


def seconds_left(run: Run, names: tuple[str, ...]) -> float | None:
    """Estimate the time that the stages `names` still take; None while no training step was measured."""
    recipe = run.recipe
    expert_runs, moe_run = experts(run), moe(run)
    expert_tokens = recipe.data.seq_length * recipe.expert_training.global_batch_size
    moe_tokens = recipe.data.seq_length * recipe.moe_global_batch_size
    measured = [(r.seconds_per_step, expert_tokens) for r in expert_runs if r.seconds_per_step is not None]
    expert_rate = statistics.median(s / t for s, t in measured) if measured else None
    moe_rate = None if moe_run.seconds_per_step is None else moe_run.seconds_per_step / moe_tokens
    known = [rate for rate in (expert_rate, moe_rate) if rate is not None]
    if not known:
        return None
    left = 0.0
    if "experts" in names:
        steps = sum(r.steps - r.done for r in expert_runs)
        jobs = sum(not _done(run.expert_folder(k)) for k in range(recipe.model.num_experts))
        alone = steps * expert_tokens * (expert_rate or known[0]) + jobs * _start_up(run)
        left += alone / max(min(recipe.expert_training.at_once, jobs), 1)
    if "moe" in names and not _done(run.stage_folder("moe")):
        left += (moe_run.steps - moe_run.done) * moe_tokens * (moe_rate or known[0]) + _start_up(run)
    if "evaluate" in names and not _done(run.stage_folder("evaluate")):
        left += _heldout_tokens(run) * EVALUATION_COST * known[-1]
    return left


def words(seconds: float) -> str:
    """Word a duration: `40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{max(round(seconds), 0)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _start_up(run: Run) -> float:
    """Seconds of an expert job outside of its steps, median of those that are finished; 0 while unknown."""
    overheads = []
    for k in range(run.recipe.model.num_experts):
        folder = run.expert_folder(k)
        numbers = read_manifest(folder).get("numbers")
        process = numbers.get("process") if isinstance(numbers, dict) else None
        path = folder / "metrics.jsonl"
        if isinstance(process, dict) and path.is_file():
            stepping = sum(float(row.get("seconds", 0.0)) for row in _tail(path))
            overheads.append(max(float(process.get("seconds", 0.0)) - stepping, 0.0))
    return statistics.median(overheads) if overheads else 0.0


def _heldout_tokens(run: Run) -> int:
    path = run.stage_folder("curate") / "heldout.jsonl"
    if not path.is_file():
        return run.recipe.data.heldout_tokens_per_domain * run.recipe.model.num_experts
    with path.open("rb") as file:
        return sum(1 for _ in file) * run.recipe.data.seq_length


def _done(folder: Path) -> bool:
    return (folder / MARKER).is_file()


def _tail(path: Path) -> list[dict[str, float]]:
    """Return the last rows of a metrics file; a line that is being written now is left out."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().split(b"\n")
    rows = []
    for line in lines[1:-1] if size > TAIL_BYTES else lines[:-1]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and all(isinstance(row.get(name, 0), int | float) for name in SHOWN):
            rows.append(row)
    return rows

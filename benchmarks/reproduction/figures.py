"""The plots of the page, PNG files beside it, from results alone; what the report draws too is drawn by its code."""

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from results import Result
from runs_table import RunsTable
from training_record import PRETRAINING

from megatron_l0moe.reports import plots
from megatron_l0moe.reports.collect import Json
from megatron_l0moe.reports.summary import router_numbers

BASE_LABEL = "base"
UNIT = 1e12
"""FLOPs of one unit on the axes."""


def write_figures(
    page: str,
    base: Result,
    results: Sequence[Result],
    controls: Sequence[Json],
    table: RunsTable,
    out: Path,
) -> dict[str, str]:
    """Write all plots for which there are results as PAGE_*.png; those of an earlier time are removed.

    Returns:
        {file name: caption}, in the order of the page.
    """
    for old in out.glob(f"{page}_*.png"):
        old.unlink()
    captions = {}
    with mpl.rc_context(plots.STYLE):
        found = _figures(base, results, table)
        if controls:
            caption = (
                "Expected retention of one expert of all domains, mean over its MoE layers, first seed, by the way in "
                "which it is held; dashed: the schedule, on which the budget lies."
            )
            found.append(("control", control_lines(controls), caption))
        for name, figure, caption in found:
            file = f"{page}_{name}.png"
            figure.savefig(out / file, metadata={"Software": None})
            captions[file] = caption
    return captions


def _figures(base: Result, results: Sequence[Result], table: RunsTable) -> list[tuple[str, Figure, str]]:
    first = {row: next(group) for row, group in groupby(results, key=lambda result: result.row)}
    compared = [r for r in first.values() if table.rows[r.row].table == "comparison" and r.training]
    found: list[tuple[str, Figure, str]] = []
    if base.training:
        caption = (
            "Training loss against training FLOPs: means over stretches of steps, first seed. Pretraining, and what "
            "came after it; dotted: mean of the K expert runs, their FLOPs together."
        )
        found.append(("compute", compute_curves(base, compared), caption))
    recorded = [result for result in results if result.training]
    if recorded:
        caption = (
            "Held-out loss above that of the base, best row first (a dot a seed, the line their mean), and the FLOPs "
            "after pretraining."
        )
        found.append(("heldout", heldout_points(base, recorded), caption))
    for row in table.drawn:
        if row in first and first[row].training.get("retention"):
            summary = {"training": {"experts": first[row].training["retention"]}}
            caption = f"Expected retention of each MoE layer in the expert runs of {row}-{first[row].seed}."
            found.append((f"retention_{row}", plots.retention_curves(summary), caption))
    with_experts = {row: result for row, result in first.items() if "overlap" in result.training}
    if with_experts:
        caption = "Mean pairwise IoU of the experts' units when they were made, first seed."
        found.append(("iou", overlap_lines(with_experts), caption))
    for row in table.drawn:
        if row in first and "router_load" in first[row].values:
            summary = {"router": router_numbers(first[row].values["router_load"])}
            caption = (
                f"Router load of {row}-{first[row].seed} on held-out text, mean over the MoE layers: the share of a "
                "domain's assignments (k for each token) that goes to each expert."
            )
            found.append((f"router_{row}", plots.router_map(summary), caption))
    return found


def compute_curves(base: Result, compared: Sequence[Result]) -> Figure:
    """Training loss over FLOPs: the pretrainings, and what each row of the comparison added."""
    figure = _figure(3.8)
    pretrainings: dict[str, Json] = {}
    for name, training in ((BASE_LABEL, base.training), *((one.row, one.training) for one in compared)):
        own = pretraining(training)
        if own and own not in pretrainings.values():
            pretrainings[name] = own
    *before, right = figure.subplots(1, 1 + bool(pretrainings), squeeze=False)[0]
    for name, one in pretrainings.items():
        before[0].plot(
            _units(one["curve"]["flops"]), one["curve"]["lm_loss"], label=name, **_style(compared, name)
        )
    for result in compared:
        start = 0.0
        for one in _later(result.training):
            curve, last = one["curve"], one is result.training["phases"][-1]
            style = _style(compared, result.row) | ({} if last else {"ls": ":", "lw": 1.0})
            label = result.row if last and result.row not in pretrainings else None
            right.plot(
                _units(start + flops for flops in curve["flops"]), curve["lm_loss"], label=label, **style
            )
            start += one["flops"]
    figure.legend(loc="outside upper center", ncols=5)
    for axes, title in zip((*before, right), ("pretraining", "after it")[-1 - len(before) :], strict=True):
        axes.set_title(title)
    figure.axes[0].set_ylabel("training loss (nats per token)")
    for axes in figure.axes:
        axes.set_xlabel("training FLOPs (1e12)")
        axes.locator_params(axis="x", nbins=5)
    return figure


def heldout_points(base: Result, results: Sequence[Result]) -> Figure:
    """Held-out loss of every row above the base's, a dot a seed, beside the FLOPs after pretraining."""
    perplexity = base.values["perplexity"]["overall"]
    rows = []
    for row, group in groupby(results, key=lambda result: result.row):
        members = list(group)
        losses = [math.log(member.values["perplexity"]["overall"] / perplexity) for member in members]
        rows.append((statistics.fmean(losses), row, losses, flops_after(members[0].training)))
    rows.sort()
    figure = _figure(1.2 + 0.27 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    for place, (mean, _, losses, flops) in enumerate(rows):
        left.plot(losses, [place] * len(losses), "o", color=plots.BLUE, ms=5, alpha=0.7)
        left.plot(mean, place, "|", color="black", ms=14, mew=1.6)
        right.barh(place, flops / UNIT, height=0.6, color=plots.SKY)
    left.axvline(0.0, color="gray", ls="--", lw=1)
    left.set_yticks(range(len(rows)), [row for _, row, *_ in rows])
    left.invert_yaxis()
    left.grid(axis="x", lw=0.4)
    left.set_xlabel("held-out loss - base's (nats per token)")
    right.set_xlabel("FLOPs after pretraining (1e12)")
    return figure


def overlap_lines(by_row: dict[str, Result]) -> Figure:
    """IoU of the experts' units by layer, a line a row, and the level of random choices."""
    figure = _figure(3.8)
    axes = figure.subplots()
    for number, (row, result) in enumerate(by_row.items()):
        iou = result.training["overlap"]["iou"]
        layers = [int(layer) for layer in iou]
        style = {"color": _colour(number), "ls": plots.LINES[number // 8 % 4], "lw": 1.2}
        axes.plot(layers, list(iou.values()), marker="os^Dv<>P"[number % 8], ms=4, label=row, **style)
    chances = {result.training["overlap"]["iou_chance"] for result in by_row.values()}
    for chance in chances:
        axes.axhline(chance, color="gray", ls="--", lw=1, label="chance")
    axes.set_xticks(layers)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer")
    axes.set_ylabel("IoU of kept units (0 to 1)")
    figure.legend(loc="outside right upper", fontsize=9)
    return figure


def control_lines(controls: Sequence[Json]) -> Figure:
    """Retention over steps, a line a control of the first seed, and the schedule."""
    figure = _figure(3.4)
    axes = figure.subplots()
    first = min(one["seed"] for one in controls)
    shown = [one for one in controls if one["seed"] == first]
    for number, one in enumerate(shown):
        axes.plot(one["retention"], label=one["control"], color=_colour(number), lw=1.4)
    axes.plot(shown[0]["target"], label="schedule", color="black", ls="--", lw=1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step of the expert run")
    axes.set_ylabel("expected retention (0 to 1)")
    figure.legend(loc="outside upper center", ncols=4)
    return figure


def flops_after(training: Json) -> float:
    """Return the FLOPs of all phases but pretraining."""
    return math.fsum(phase["flops"] for phase in _later(training))


def pretraining(training: Json) -> Json | None:
    """Return the phase of pretraining; None of a base that was there."""
    return next((phase for phase in training.get("phases", ()) if phase["name"] == PRETRAINING), None)


def _later(training: Json) -> list[Json]:
    return [phase for phase in training["phases"] if phase["name"] != PRETRAINING]


def _style(compared: Sequence[Result], row: str) -> Json:
    """Return colour and line of a row of the comparison, or of the base."""
    if row == BASE_LABEL:
        return {"color": "black", "ls": "-", "lw": 1.4}
    number = [result.row for result in compared].index(row)
    return {"color": _colour(number), "ls": plots.LINES[number % 3], "lw": 1.4}


def _colour(number: int) -> str:
    return plots.COLOURS[number % len(plots.COLOURS)]


def _units(flops: Iterable[float]) -> list[float]:
    return [value / UNIT for value in flops]


def _figure(height: float) -> Figure:
    return Figure(figsize=(8.4, height), layout="constrained")

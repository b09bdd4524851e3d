"""The report's plots, as SVG text to put into the page; drawn from the summary alone.

Colours are Okabe and Ito's, which colour-blind readers can tell apart, and viridis/cividis for heat maps; lines
differ in style or carry a label as well. The same summary gives the same text.
"""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.cm
import matplotlib.colors
import matplotlib.lines
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_l0moe.recipe.recipe import TITLES
from megatron_l0moe.reports.collect import Json

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, "#000000", "#8C8C00")
LINES = ("-", "--", "-.", ":")
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a source domain may be named `$_$`
    "figure.dpi": 100,
}
MODES = {"prefill": "prefill", "decode_b1": "decode, batch 1", "decode_b8": "decode, batch 8"}
EXTRA_CURVES = {"balance_loss": "balance loss (eq. 3)", "active_fraction": "share of open blocks"}
"""Curves of the stage `moe`; the first that was recorded is drawn."""
ANNOTATED_CELLS = 80
"""Heat maps with more cells carry no numbers in them."""


def draw(summary: Json) -> dict[str, str]:
    """Return {name: SVG element} of all plots."""
    plots = {"speed": speed_bars, "ccm": ccm_map}
    if summary["training"]["experts"]:  # else made without training, or another method
        plots |= {"retention": retention_curves, "expert_losses": expert_losses}
    if "masks" in summary:
        plots["retention"] = retention_curves
    if "experts" in summary:
        plots["iou"] = iou_bars
    if "router" in summary:
        plots |= {"router": router_map, "router_layers": router_layers}
    if "blocks" in summary:
        plots |= {"blocks": block_map, "block_layers": block_layers}
    plots["moe_losses"] = moe_losses
    svgs = {}
    for name, plot in plots.items():
        with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
            figure = plot(summary)
            svgs[name] = to_svg(figure, prefix=name)
    return svgs


def to_svg(figure: Figure, *, prefix: str) -> str:
    """Return the figure as an `svg` element for HTML: no date, no name spaces, ids that are unique on the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", text)


def speed_bars(summary: Json) -> Figure:
    """Bars of the measured ratios with their range, and the bounds as lines across them."""
    figure = _figure(3.2)
    axes = figure.subplots()
    speed = summary["speed"]
    for x, mode in enumerate(MODES):
        ratio, bound = speed["details"][mode]["ratio"], speed["bounds"][mode]
        axes.bar(
            x, ratio["median"], width=0.5, color=SKY, label="measured, median of pairs" if x == 0 else None
        )
        spread = [[ratio["median"] - ratio["min"]], [ratio["max"] - ratio["median"]]]
        axes.errorbar(
            x,
            ratio["median"],
            spread,
            color="black",
            capsize=4,
            lw=1,
            label="smallest to largest" if x == 0 else None,
        )
        axes.hlines(
            bound,
            x - 0.36,
            x + 0.36,
            color=RED,
            lw=2.5,
            label="bound from parameter counts" if x == 0 else "",
        )
        axes.annotate(f"{ratio['median']:.2f}", (x, 0.05), fontsize=11, ha="center")
        axes.annotate(f"{bound:.2f}", (x + 0.38, bound), color=RED, va="center", backgroundcolor="white")
    axes.axhline(1.0, color="gray", ls="--", lw=1, label="as fast as dense", zorder=0)
    axes.set_xlim(-0.5, len(MODES) - 0.38)
    top = max(max(speed["details"][m]["ratio"]["max"], speed["bounds"][m]) for m in MODES)
    axes.set_ylim(0, top * 1.15)
    axes.set_xticks(range(len(MODES)), list(MODES.values()))
    axes.set_ylabel(f"dense time / {TITLES[summary['recipe']['method']]} time (ratio)")
    figure.legend(loc="outside upper center", ncols=4, fontsize=9)
    return figure


def ccm_map(summary: Json) -> Figure:
    """CCM of eq. 4 as a heat map, iterations in training order, with d_ds of eq. 5 beside it."""
    rows = summary["ccm"]["in_training_order"]
    figure = _figure(1.9 + 0.34 * len(rows))
    left, right = figure.subplots(1, 2, width_ratios=(3, 1.3))
    _heat(figure, left, [row["ccm"] for row in rows], label="CCM (eq. 4, no unit)", digits=3)
    labels = [str(row["iteration"]) for row in rows]
    left.set_yticks(range(len(rows)), labels)
    left.set_xlabel("cluster")
    left.set_ylabel("iteration, in training order")
    distances = [row["d_ds"] for row in rows]
    right.plot(distances, range(len(rows)), "o-", color=BLUE)
    right.set_yticks(range(len(rows)), labels)
    right.set_ylim(len(rows) - 0.5, -0.5)
    right.set_xlabel("$d_{ds}$ (eq. 5, no unit)", parse_math=True)
    right.margins(x=0.3)
    right.locator_params(axis="x", nbins=3)
    return figure


def retention_curves(summary: Json) -> Figure:
    """Expected L0 retention of every MoE layer over the steps of each masked run, with the target r of eq. 2."""
    runs = [run for run in summary["training"]["experts"] if "layers" in run["retention"]]
    if "masks" in summary:
        runs = [summary["masks"]["run"]]
    columns = min(len(runs), 2)
    rows = -(-len(runs) // columns)
    figure = _figure(1.0 + 1.9 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    depth = [int(layer) for layer in runs[0]["retention"]["layers"]]
    colours = mpl.colormaps["viridis"]
    norm = mpl.colors.Normalize(min(depth), max(max(depth), min(depth) + 1))
    for k, axes in enumerate(grid.flat):
        if k >= len(runs):
            axes.set_visible(False)
            continue
        run = runs[k]
        for layer, values in run["retention"]["layers"].items():
            axes.plot(run["step"], values, color=colours(norm(int(layer))), lw=0.8)
        axes.plot(run["step"], run["retention"]["target"], color="black", ls="--", lw=1.6)
        if run["frozen_from"] is not None:
            axes.axvline(run["frozen_from"], color=RED, ls=":", lw=1.4)
        axes.set_title("all masks" if "masks" in summary else f"expert {k}")
        axes.set_ylim(0, 1.03)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("retention (fraction of FFN units)", fontsize=10)
    figure.colorbar(
        mpl.cm.ScalarMappable(norm, colours),
        ax=grid,
        label="layer",
        fraction=0.05,
        ticks=MaxNLocator(integer=True),
    )
    key = [
        mpl.lines.Line2D([], [], color="black", ls="--", label="target r"),
        mpl.lines.Line2D([], [], color=RED, ls=":", label="masks frozen from here"),
    ]
    figure.legend(handles=key, loc="outside upper center", ncols=2, fontsize=9)
    return figure


def iou_bars(summary: Json) -> Figure:
    """Mean pairwise overlap of the experts' units by layer, with the level that random choices would have."""
    experts = summary["experts"]
    figure = _figure(2.8)
    axes = figure.subplots()
    positions = range(len(experts["iou"]))
    axes.bar(positions, list(experts["iou"].values()), color=SKY)
    axes.axhline(experts["iou_chance"], color=RED, ls="--", lw=1.5)
    axes.annotate(
        f"chance {experts['iou_chance']:.3f}",
        (0.01, experts["iou_chance"]),
        xycoords=("axes fraction", "data"),
        va="bottom",
        color="black",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )
    step = -(-len(experts["iou"]) // 30)
    axes.set_xticks(list(positions)[::step], list(experts["iou"])[::step])
    axes.set_xlabel("layer")
    axes.set_ylabel("IoU of kept units (0 to 1)")
    return figure


def router_map(summary: Json) -> Figure:
    """Share of the assignments that each expert gets in each source domain, mean over the MoE layers."""
    return _by_domain(summary["router"]["mean_load"], "expert", "share of assignments")


def block_map(summary: Json) -> Figure:
    """Share of the tokens that open each block of a DSMoE in each source domain, mean over the layers."""
    return _by_domain(summary["blocks"]["by_domain"], "block", "share of tokens")


def _by_domain(shares: dict[str, list[float]], what: str, label: str) -> Figure:
    figure = _figure(1.4 + 0.34 * len(shares))
    axes = figure.subplots()
    _heat(figure, axes, list(shares.values()), label=label, digits=2)
    axes.set_yticks(range(len(shares)), list(shares))
    axes.set_xlabel(what)
    axes.set_ylabel("source domain")
    return figure


def router_layers(summary: Json) -> Figure:
    """Share of the busiest expert by MoE layer and source domain: how decided the routers are, and where."""
    return _by_layer(summary["router"]["largest_share"], "share of busiest expert")


def block_layers(summary: Json) -> Figure:
    """Share of a DSMoE's blocks that are open by layer and source domain: what is computed, and where."""
    return _by_layer(summary["blocks"]["by_layer"], "share of open blocks")


def _by_layer(layers: dict[str, dict[str, float]], label: str) -> Figure:
    domains = list(next(iter(layers.values())))
    figure = _figure(1.4 + 0.34 * len(domains))
    axes = figure.subplots()
    values = [[shares[domain] for shares in layers.values()] for domain in domains]
    _heat(figure, axes, values, label=label, digits=2)
    axes.set_yticks(range(len(domains)), domains)
    step = -(-len(layers) // 30)
    axes.set_xticks(list(range(len(layers)))[::step], list(layers)[::step])
    axes.set_xlabel("layer")
    axes.set_ylabel("source domain")
    return figure


def expert_losses(summary: Json) -> Figure:
    """Training loss of the K expert runs."""
    figure = _figure(3)
    axes = figure.subplots()
    runs = summary["training"]["experts"]
    for k, run in enumerate(runs):
        axes.plot(
            run["step"],
            run["lm_loss"],
            color=COLOURS[k % len(COLOURS)],
            ls=LINES[k // len(COLOURS) % len(LINES)],
            lw=1.2,
            label=f"expert {k}" if len(runs) <= len(COLOURS) else None,
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    if len(runs) <= len(COLOURS):
        figure.legend(loc="outside upper center", ncols=min(len(runs), 4), fontsize=9)
    return figure


def moe_losses(summary: Json) -> Figure:
    """Training loss of the stage `moe`, and the router's balance loss or the open blocks where they were recorded."""
    moe = summary["training"]["moe"]
    extra = [name for name in EXTRA_CURVES if name in moe][:1]
    figure = _figure(4.2 if extra else 2.8)
    panels = figure.subplots(
        1 + len(extra), 1, sharex=True, squeeze=False, height_ratios=(2, 1)[: 1 + len(extra)]
    )
    panels[0][0].plot(moe["step"], moe["lm_loss"], color=BLUE, lw=1.2)
    panels[0][0].set_ylabel("loss (nats per token)")
    for name in extra:
        panels[1][0].plot(moe["step"], moe[name], color=ORANGE, lw=1.2)
        panels[1][0].set_ylabel(EXTRA_CURVES[name])
    panels[-1][0].set_xlabel("step")
    return figure


def _figure(height: float) -> Figure:
    return Figure(figsize=(8.4, height), layout="constrained")  # inches, 72 points each in the SVG


def _heat(figure: Figure, axes: Any, values: Sequence[Sequence[float]], *, label: str, digits: int) -> None:
    table = np.asarray(values, dtype=np.float64)
    rows, columns = table.shape
    edges = (np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5)
    image = axes.pcolormesh(*edges, table, cmap="cividis", edgecolors="white", linewidth=0.5)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if columns <= 30:
        axes.set_xticks(range(columns))
    figure.colorbar(image, ax=axes, label=label)
    if table.size <= ANNOTATED_CELLS:
        middle = (table.min() + table.max()) / 2
        for (row, column), value in np.ndenumerate(table):
            colour = "black" if value > middle else "white"
            axes.text(column, row, f"{value:.{digits}f}", ha="center", va="center", color=colour, fontsize=8)

"""The page of results as Markdown, in tables like the paper's; every number comes from a result folder."""

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import get_args

from figures import flops_after, pretraining
from results import BASE, Result
from runs_table import RunsTable, TableName
from speed_step import TIMED_TABLES

from megatron_l0moe.reports.collect import Json
from megatron_l0moe.reports.plots import MODES
from megatron_l0moe.reports.summary import router_numbers

NONE = "-"
"""A cell for which nothing was measured, or that has no meaning in its row."""
INTRODUCTION = """\
Written by `benchmarks/reproduction/run.py tables` from the result folders. Perplexity is that on held-out text as a
ratio to the dense base (below 1 is better), mean over the seeds with the sample standard deviation in brackets; all
seeds start from one base. The column `/ NAME` is the ratio to that row's run of the same seed. How tokens and active
parameters are counted: `benchmarks/reproduction/runs.yaml`; the tokens of a row come on top of pretraining.

FLOPs are those of matrix products and causal attention scores, a multiply-add as two
(`megatron_l0moe/sizes/flops.py`). A token's forward pass takes two for each weight that it is multiplied with and,
in each layer, two for each position of the sequence and channel of the query heads; the backward pass takes twice that,
but for an expert run, in which nothing below the lowest mask is trained. A calibration pass counts as its forward
passes; what a method computes from them is left out. In training DSMoE and Mixture-of-Masks compute the whole FFN.
"""
CONTROL_COLUMNS = {
    "mean_distance": "mean distance",
    "largest_distance": "largest",
    "frozen_loss": "loss with the frozen mask",
}
CONTROL_NOTE = """\
Distance: of the expected retention of a layer from the schedule, over layers and the steps before the mask is frozen.
Loss: nats per token in training, mean over the steps after that. All train on the same sequences; the seeds are those
of the gates' noise."""
SPEED_NOTE = """\
Prefill and decode are times of the base over times of the row, median of pairs with the quartiles in brackets: above 1
the row is faster. Each row was timed in pairs with the base in one process, by transformers in fp32 and one thread, on
the same held-out text.
"""


def markdown(
    title: str,
    base: Result,
    results: Sequence[Result],
    table: RunsTable,
    figures: Mapping[str, str] | None = None,
    controls: Sequence[Json] = (),
) -> str:
    """Return the page; `figures` are {file name: caption}."""
    by_row = {row: list(group) for row, group in groupby(results, key=lambda result: result.row)}
    reference = by_row.get(table.reference, [])
    tables = Tables(base, table.reference, reference)
    of = {
        name: {row: group for row, group in by_row.items() if table.rows[row].table == name}
        for name in get_args(TableName)
    }
    lines = [f"# {title}", "", INTRODUCTION, *_provenance([base, *results]), ""]
    lines += ["## Against dense models (in the form of the paper's Table 2)", ""]
    lines += tables.comparison(of["comparison"])
    lines += ["", SPEED_NOTE, *_speed_lines(results)]
    shared = {table.reference: reference} if reference else {}
    if of["ablations"]:
        lines += ["", "## Ablations of construction and data (Table 3)", ""]
        lines += tables.ablations(shared | of["ablations"])
    if of["changes"]:
        lines += ["", "## Single settings changed (not in the paper)", ""]
        lines += tables.ablations(shared | of["changes"])
    if controls:
        lines += ["", "## Ways to hold the retention (one expert of all domains)", "", *_controls(controls)]
    if of["sweeps"]:
        lines += ["", "## Sweeps of Q and K (Table 4)", "", *tables.sweeps(shared | of["sweeps"])]
    lines += ["", "## By domain", "", *tables.domains(by_row)]
    if rows := tables.specialisation(by_row):
        lines += ["", "## Specialisation of the experts", "", *rows]
    if figures:
        lines += ["", "## Plots"]
        for file, caption in figures.items():
            lines += ["", f"![{Path(file).stem}]({file})", "", caption]
    missing = {"Not run": not_run(table, results), "Not timed": not_timed(table, results)}
    for what, rows in missing.items():
        if rows:
            lines += ["", f"{what}: {', '.join(rows)}."]
    return "\n".join(lines) + "\n"


def not_run(table: RunsTable, results: Sequence[Result]) -> list[str]:
    """Return the runs of the table without a result; a row none of whose seeds has one by its name alone."""
    done = {(result.row, result.seed) for result in results}
    missing = []
    for row, settings in table.rows.items():
        absent = [seed for seed in settings.seeds or table.seeds if (row, seed) not in done]
        if all(result.row != row for result in results):
            missing.append(row)
        elif absent:
            missing.append(f"{row} (seed {', '.join(map(str, absent))})")
    return missing


def not_timed(table: RunsTable, results: Sequence[Result]) -> list[str]:
    """Return the rows that have columns of speed and no times."""
    timed = {result.row for result in results if result.speed}
    return [row for row, one in table.rows.items() if one.table in TIMED_TABLES and row not in timed]


class Tables:
    """The tables of one page; a group is the results of a row, one a seed."""

    def __init__(self, base: Result, name: str, reference: Sequence[Result]) -> None:
        self._base = base
        self._last = ["all domains", f"/ {name}"]
        self._reference = {result.seed: result for result in reference}

    def comparison(self, rows: Mapping[str, Sequence[Result]]) -> list[str]:
        """Return the rows beside the base, with compute and speed."""
        head = ["model", "seeds", "tokens", "FLOPs of pretraining", "FLOPs after it", "parameters", "active"]
        base = self._base
        perplexity = f"{BASE} (perplexity {base.values['perplexity']['overall']:.2f})"
        cells = [perplexity, str(base.training.get("seed") or NONE), _millions(base, "tokens")]
        cells += [_pretraining(base.training), NONE, *_sizes(base), "1"]
        body = [cells + ["1"] * len(MODES)]
        for row, group in rows.items():
            first = group[0]
            cells = [row, _seeds(group), _millions(first, "tokens"), _pretraining(first.training)]
            cells += [_flops(first.training), *_sizes(first), self._to_base(group)]
            body.append(cells + _speeds(group))
        return _table([*head, "all domains", *MODES.values()], body)

    def ablations(self, rows: Mapping[str, Sequence[Result]]) -> list[str]:
        """Return the rows beside the reference."""
        body = [
            [
                *(row, _seeds(group), _millions(group[0], "tokens"), _flops(group[0].training)),
                *(_millions(group[0], "active_parameters"), self._to_base(group), self._to_reference(group)),
            ]
            for row, group in rows.items()
        ]
        return _table(["method", "seeds", "tokens", "FLOPs", "active", *self._last], body)

    def sweeps(self, rows: Mapping[str, Sequence[Result]]) -> list[str]:
        """Return the rows with Q, K, parameters and speed."""
        body = []
        for row, group in rows.items():
            first = group[0]
            cells = [row, *(str(first.training.get(key, NONE)) for key in ("iterations", "num_experts"))]
            cells += [_seeds(group), _millions(first, "tokens"), *_sizes(first)]
            body.append([*cells, self._to_base(group), self._to_reference(group), *_speeds(group)])
        head = ["row", "Q", "K", "seeds", "tokens", "parameters", "active", *self._last]
        return _table([*head, *MODES.values()], body)

    def domains(self, rows: Mapping[str, Sequence[Result]]) -> list[str]:
        """Return the base's perplexity in each domain and the ratios of all rows."""
        base = self._base.values["perplexity"]["per_domain"]
        body = [[f"{BASE}, perplexity", *(f"{base[domain]:.2f}" for domain in sorted(base))]]
        for row, group in rows.items():
            body.append([row, *(self._to_base(group, domain) for domain in sorted(base))])
        return _table(["model", *sorted(base)], body)

    def specialisation(self, rows: Mapping[str, Sequence[Result]]) -> list[str]:
        """Return overlap and router load of the rows that have experts."""
        body = []
        for row, group in rows.items():
            overlaps = [r.training["overlap"] for r in group if "overlap" in r.training]
            loads = [r.values["router_load"] for r in group if "router_load" in r.values]
            if overlaps or loads:
                iou, share = [NONE] * 2, [NONE] * 2
                if overlaps:
                    iou = [_mean([o["iou_mean"] for o in overlaps]), f"{overlaps[0]['iou_chance']:.3f}"]
                if loads:
                    share = [_mean([largest_share(load) for load in loads]), _uniform(loads[0])]
                body.append([row, *iou, *share])
        head = ["row", "IoU of kept units", "by chance", "busiest expert's share", "even share"]
        note = (
            "IoU: mean over layers and pairs of experts, when they were made. Busiest expert's share: of a domain's "
            "assignments in a layer, mean over domains and layers, on held-out text; at most 1 / top-k."
        )
        return [*_table(head, body), "", note] if body else []

    def _to_base(self, group: Sequence[Result], domain: str | None = None) -> str:
        return _mean([_perplexity(result, domain) / _perplexity(self._base, domain) for result in group])

    def _to_reference(self, group: Sequence[Result]) -> str:
        pairs = [(result, self._reference[result.seed]) for result in group if result.seed in self._reference]
        return _mean([_perplexity(one, None) / _perplexity(other, None) for one, other in pairs])


def _controls(controls: Sequence[Json]) -> list[str]:
    body = []
    for name in dict.fromkeys(one["control"] for one in controls):
        group = [one for one in controls if one["control"] == name]
        measured = [_mean([one[key] for one in group]) for key in CONTROL_COLUMNS]
        body.append(
            [name, str(len(group[0]["target"])), ", ".join(str(one["seed"]) for one in group), *measured]
        )
    return [*_table(["control", "steps", "seeds", *CONTROL_COLUMNS.values()], body), "", CONTROL_NOTE]


def largest_share(load: Json) -> float:
    """Return the share of the busiest expert, mean over layers and domains."""
    shares = router_numbers(load)["largest_share"]
    return statistics.fmean(value for domains in shares.values() for value in domains.values())


def public_command(words: Sequence[str]) -> str:
    """Return a command with absolute paths cut to their last part: where a user keeps files is nobody's business."""
    return " ".join(["run.py", *(re.sub(r"(^|=)/(\S*/)?", r"\1", word) for word in words[1:])])


def _provenance(results: Sequence[Result]) -> list[str]:
    def distinct(value: Callable[[Result], object]) -> str:
        return ", ".join(sorted({str(value(result)) for result in results}))

    dates = sorted(str(result.manifest["finished"]) for result in results)
    commands = sorted({public_command(result.manifest["command"]) for result in results})
    versions = results[0].values["machine"].get("versions", {})
    return [
        f"- hardware: {distinct(lambda result: result.values['machine']['cpu'])}, "
        f"{distinct(lambda result: result.values['machine']['threads'])} thread(s)",
        f"- software: {', '.join(f'{name} {number}' for name, number in versions.items())}",
        f"- measured: {dates[0]} to {dates[-1]}",
        f"- commits: {distinct(lambda result: result.manifest['commit'])}",
        f"- commands: {', '.join(f'`{command}`' for command in commands)}",
    ]


def _speed_lines(results: Sequence[Result]) -> list[str]:
    speeds = [result.speed for result in results if result.speed]
    if not speeds:
        return []
    cells = []
    for mode, name in MODES.items():
        rates = [speed["details"][mode]["dense"]["tokens_per_second"] for speed in speeds]
        cells.append(f"{name} {statistics.median(rates):.0f}")
    machines = sorted({str(speed["hardware"]["cpu"]) for speed in speeds})
    dates = sorted(str(speed["hardware"]["date"]) for speed in speeds)
    return [
        f"The base's tokens per second: {', '.join(cells)}; {speeds[0]['settings']['repeats']} pairs; "
        f"{', '.join(machines)}; {dates[0]} to {dates[-1]}."
    ]


def _speeds(group: Sequence[Result]) -> list[str]:
    speed = next((result.speed for result in group if result.speed), None)
    if speed is None:
        return [NONE] * len(MODES)
    ratios = [speed["details"][mode]["ratio"] for mode in MODES]
    return [f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]" for ratio in ratios]


def _perplexity(result: Result, domain: str | None) -> float:
    table = result.values["perplexity"]
    return float(table["overall"] if domain is None else table["per_domain"][domain])


def _mean(values: Sequence[float]) -> str:
    if not values:
        return NONE
    mean = f"{statistics.fmean(values):.3f}"
    if len(values) < 2:
        return mean
    spread = statistics.stdev(values)
    assert math.isfinite(spread)
    return f"{mean} ({spread:.3f})"


def _uniform(load: Json) -> str:
    return f"{router_numbers(load)['uniform_share']:.3f}"


def _seeds(group: Sequence[Result]) -> str:
    return ", ".join(str(result.seed) for result in group)


def _flops(training: Json) -> str:
    """Return the FLOPs of all phases after pretraining."""
    return f"{flops_after(training):.2e}" if training else NONE


def _pretraining(training: Json) -> str:
    """Return the FLOPs of pretraining, of a base that was there none."""
    found = pretraining(training)
    return f"{found['flops']:.2e}" if found else NONE


def _sizes(result: Result) -> list[str]:
    return [_millions(result, "parameters"), _millions(result, "active_parameters")]


def _millions(result: Result, key: str) -> str:
    return f"{result.values[key] / 1e6:.2f} M" if result.values[key] else NONE


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    assert all(len(row) == len(head) for row in body), head
    rows = [head, ["---"] * len(head), *body]
    return [f"| {' | '.join(row)} |" for row in rows]

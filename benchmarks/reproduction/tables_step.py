"""Step `tables`: docs/results/reproduction.md and .json out of the result folders; no number is typed by hand."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runs_table import RunsTable
from settings import Place

from megatron_l0moe.data.manifest import read_manifest, write_json, write_text
from megatron_l0moe.errors import L0MoEError

BASE = "base"


@dataclass(frozen=True)
class Result:
    """One measured model."""

    row: str
    seed: int | None
    values: dict[str, Any]
    manifest: dict[str, Any]


def write_tables(place: Place, table: RunsTable, out: Path) -> dict[str, object]:
    """Write the tables of what has been measured so far; rows without a result are named as not run."""
    base = _read(place, BASE, None, BASE)
    if base is None:
        raise L0MoEError(f"{place.root} has no results; run the steps base and methods first.")
    found = [_read(place, case.row, case.seed, case.name) for case in table.cases()]
    results = [result for result in found if result is not None]
    not_run = [row for row in table.rows if all(result.row != row for result in results)]
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "reproduction.md", markdown(base, results, not_run))
    record = [{"row": r.row, "seed": r.seed, **r.values} for r in (base, *results)]
    write_json(out / "reproduction.json", {"results": record, "not_run": not_run})
    return {"results": len(results), "not_run": not_run}


def markdown(base: Result, results: Sequence[Result], not_run: Sequence[str]) -> str:
    """Return the page."""
    rows = list(dict.fromkeys(result.row for result in results))
    domains = sorted(base.values["perplexity"]["per_domain"])
    by_row = {row: [result for result in results if result.row == row] for row in rows}
    lines = [
        "# Results of the reproduction in small",
        "",
        "Written by `benchmarks/reproduction/run.py tables` from the result folders. Perplexity on held-out text as a "
        "ratio to the dense base (below 1 is better), mean over the seeds with the sample standard deviation in "
        "brackets. How tokens and active parameters are counted: `benchmarks/reproduction/runs.yaml`; the tokens of a "
        "row come on top of the base's pretraining.",
        "",
        *_provenance([base, *results]),
        "",
        "| method | seeds | tokens | parameters | active | all domains |",
        "|---|---|---|---|---|---|",
        f"| {BASE} (perplexity {base.values['perplexity']['overall']:.2f}) | | {_sizes(base)} | 1 |",
    ]
    for row, group in by_row.items():
        ratios = [_ratio(result, base, None) for result in group]
        seeds = ", ".join(str(result.seed) for result in group)
        lines.append(f"| {row} | {seeds} | {_sizes(group[0])} | {_mean(ratios)} |")
    lines += ["", f"| domain | base | {' | '.join(rows)} |", "|---" * (len(rows) + 2) + "|"]
    for domain in domains:
        cells = [_mean([_ratio(result, base, domain) for result in group]) for group in by_row.values()]
        lines.append(
            f"| {domain} | {base.values['perplexity']['per_domain'][domain]:.2f} | {' | '.join(cells)} |"
        )
    if not_run:
        lines += ["", f"Not run: {', '.join(not_run)}."]
    return "\n".join(lines) + "\n"


def _read(place: Place, row: str, seed: int | None, name: str) -> Result | None:
    folder = place.root / "results" / name
    manifest = read_manifest(folder)
    if not manifest:
        return None
    return Result(row, seed, json.loads((folder / "result.json").read_text(encoding="utf-8")), manifest)


def _provenance(results: Sequence[Result]) -> list[str]:
    def distinct(values: Sequence[object]) -> str:
        return ", ".join(sorted({str(value) for value in values}))

    machines = [result.values["machine"] for result in results]
    dates = sorted(str(result.manifest["finished"]) for result in results)
    return [
        f"- hardware: {distinct([machine['cpu'] for machine in machines])}, one thread",
        f"- measured: {dates[0]} to {dates[-1]}",
        f"- commits: {distinct([result.manifest['commit'] for result in results])}",
    ]


def _ratio(result: Result, base: Result, domain: str | None) -> float:
    def perplexity(one: Result) -> float:
        table = one.values["perplexity"]
        return float(table["overall"] if domain is None else table["per_domain"][domain])

    return perplexity(result) / perplexity(base)


def _mean(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    if len(values) < 2:
        return mean
    spread = statistics.stdev(values)
    assert math.isfinite(spread)
    return f"{mean} ({spread:.3f})"


def _sizes(result: Result) -> str:
    values = result.values
    numbers = (values["tokens"], values["parameters"], values["active_parameters"])
    return " | ".join(f"{number / 1e6:.2f} M" for number in numbers)

#!/usr/bin/env python3
"""Write the pages of words about the results from templates that take every number from the tables' JSON files.

    python benchmarks/reproduction/prose.py [docs]

A template `NAME.md.j2` calls the methods of `Numbers` by the names of `helpers`; a page of numbers is named by its file
name, the reproduction's own where none is.
"""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.reports.collect import Json
from megatron_l0moe.runs.stage_folder import write_text

HERE = Path(__file__).resolve().parent
PAGES = {"choosing.md": "choosing.md", "findings.md": "results/findings.md"}
"""Template without `.j2`, and the page below docs/."""
MAIN = "reproduction"


class Numbers:
    """What the tables hold, worded for a sentence; all means are over seeds."""

    def __init__(self, tables: dict[str, Json]) -> None:
        self._rows: dict[str, dict[str, list[Json]]] = {}
        for page, table in tables.items():
            rows = self._rows[page] = {}
            for one in table["results"]:
                rows.setdefault(one["row"], []).append(one)
        self._controls: dict[str, list[Json]] = {}
        for one in tables.get(MAIN, {}).get("controls", []):
            self._controls.setdefault(one["control"], []).append(one)

    def control(self, name: str, key: str = "frozen_loss") -> str:
        """Return what a way to hold the retention ended with: loss with the frozen mask, or `largest_distance`."""
        if name not in self._controls:
            raise L0MoEError(
                f"A template asks for the control {name!r}; there are {', '.join(self._controls)}."
            )
        return _mean([one[key] for one in self._controls[name]])

    def ratio(self, row: str, to: str = "base", *, domain: str | None = None, page: str = MAIN) -> str:
        """Return perplexity over that of another row, of the same seed where both have seeds."""
        return _mean(self._ratios(row, to, domain, page))

    def perplexity(self, row: str, *, page: str = MAIN) -> str:
        """Return the held-out perplexity over all domains."""
        return f"{statistics.fmean(one['perplexity']['overall'] for one in self._of(row, page)):.1f}"

    def seeds(self, row: str, *, page: str = MAIN) -> int:
        """Return how many seeds a row has."""
        return len(self._of(row, page))

    def speed(self, row: str, mode: str, *, page: str = MAIN) -> str:
        """Return how many times faster than the base a row is: prefill, decode_b1 or decode_b8."""
        timed = next(one["speed"] for one in self._of(row, page) if "speed" in one)
        return f"{timed[mode]['ratio']['median']:.2f}"

    def active(self, row: str, *, page: str = MAIN) -> str:
        """Return the parameters that serve a token, as a share of the base's."""
        share = self._of(row, page)[0]["active_parameters"] / self._of("base", page)[0]["active_parameters"]
        return f"{100 * share:.0f} %"

    def size(self, row: str, *, page: str = MAIN) -> str:
        """Return the parameters that a model has, as a multiple of the base's."""
        return f"{self._of(row, page)[0]['parameters'] / self._of('base', page)[0]['parameters']:.2f}"

    def tokens(self, row: str, *, page: str = MAIN) -> str:
        """Return the tokens that a row was trained on, in millions."""
        return f"{self._of(row, page)[0]['tokens'] / 1e6:.2f}"

    def parameters(self, row: str, *, page: str = MAIN) -> str:
        """Return the parameters of a model in millions."""
        return f"{self._of(row, page)[0]['parameters'] / 1e6:.1f}"

    def flops(self, row: str, to: str, *, page: str = MAIN) -> str:
        """Return the training FLOPs after pretraining as a multiple of another row's."""
        mine, other = (self._after(name, page) for name in (row, to))
        return f"{mine / other:.2f}"

    def open_blocks(self, row: str = "dsmoe", *, page: str = MAIN) -> str:
        """Return how many blocks a token of DSMoE opens."""
        return f"{statistics.fmean(one['open_blocks'] for one in self._of(row, page)):.1f}"

    def largest_share(self, row: str, *, page: str = MAIN) -> str:
        """Return the busiest expert's share of a domain's assignments."""
        return f"{statistics.fmean(one['router']['mean_largest_share'] for one in self._of(row, page)):.2f}"

    def iou(self, row: str, which: str = "iou_mean", *, page: str = MAIN) -> str:
        """Return the overlap of the experts' units, or `iou_chance`."""
        return f"{statistics.fmean(one['overlap'][which] for one in self._of(row, page)):.2f}"

    def helpers(self) -> dict[str, Callable[..., Any]]:
        """Return the functions that a template may call."""
        return {
            name: getattr(self, name) for name in dir(self) if not name.startswith("_") and name != "helpers"
        }

    def _of(self, row: str, page: str) -> list[Json]:
        if page not in self._rows:
            raise L0MoEError(f"A template asks for the page {page!r}; there are {', '.join(self._rows)}.")
        if row not in self._rows[page]:
            raise L0MoEError(
                f"A template asks for the row {row!r} of {page}, which has {', '.join(self._rows[page])}."
            )
        return self._rows[page][row]

    def _ratios(self, row: str, to: str, domain: str | None, page: str) -> list[float]:
        def perplexity(one: Json) -> float:
            table = one["perplexity"]
            return float(table["overall"] if domain is None else table["per_domain"][domain])

        others = {one["seed"]: one for one in self._of(to, page)}
        pairs = [(one, others.get(one["seed"], others.get(None))) for one in self._of(row, page)]
        values = [perplexity(one) / perplexity(other) for one, other in pairs if other]
        if not values:
            raise L0MoEError(f"The rows {row!r} and {to!r} of {page} have no seed in common.")
        return values

    def _after(self, row: str, page: str) -> float:
        phases = self._of(row, page)[0]["phases"]
        return float(sum(phase["flops"] for phase in phases if phase["name"] != "pretraining"))


def _mean(values: list[float]) -> str:
    spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def write_prose(docs: Path) -> None:
    """Write the pages below a documentation folder from the JSON files in its results/.

    Raises:
        L0MoEError: a template asks for a row, or for a page of numbers, that is not there.
    """
    for page, text in render(docs / "results").items():
        write_text(docs / page, text)


def render(results: Path) -> dict[str, str]:
    """Return the text of every page, by its place below docs/."""
    tables = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in results.glob("*.json")}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701  # Markdown from our own numbers
    )
    environment.globals.update(Numbers(tables).helpers())
    return {page: environment.get_template(f"{name}.j2").render() for name, page in PAGES.items()}


if __name__ == "__main__":
    write_prose(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parents[1] / "docs")

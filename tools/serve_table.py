"""Comparing log-probabilities of several engines: rows, verdicts, and the table of `serve_check.py`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_server import Completion

from megatron_l0moe.runs.stage_folder import write_text

BEGIN, END = "<!-- written by make serve-check -->", "<!-- end of the table -->"
LOGPROB_ATOL = 2e-4
"""Largest difference of log-probabilities of two float32 programs over 30 layers and 49,152 tokens: both sum in other
orders. Seen: about 1e-5. A fault on purpose changes them by more than a hundred times this."""
FAULT_ATOL = 1e-2
"""A fault on purpose must show at least this difference, or the check could not see one."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison."""

    model: str
    layout: str
    engine: str
    positions: int
    difference: float
    """Largest difference of log-probabilities from transformers of the training environment; NaN: not numbers."""
    greedy: str
    """Greedy tokens that are equal, of all; empty for engines that generate nothing."""
    expected: str = "equal"
    """`equal`; `fault`: this one must not be; `unset`: the engine computes with memory that nothing was written to."""

    @property
    def passed(self) -> bool:
        """Whether it is as it must be."""
        if self.expected == "unset":
            return True  # zeros may lie there, which would be right
        if self.expected == "fault":
            return not self.difference < FAULT_ATOL  # NaN is a fault that shows
        return self.difference <= LOGPROB_ATOL and len(set(self.greedy.split("/"))) == 1

    @property
    def verdict(self) -> str:
        """Say it in words."""
        if self.expected == "unset" and not self.positions:
            return "refused"
        if self.expected == "unset":
            return "right by chance" if self.difference <= LOGPROB_ATOL else "wrong, without an error"
        if self.expected == "fault":
            return "fault seen" if self.passed else "FAULT NOT SEEN"
        return "equal" if self.passed else "DIFFERENT"

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict; JSON has no NaN, so that difference is None."""
        return asdict(self) | {"difference": None if math.isnan(self.difference) else self.difference}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint to serve."""

    name: str
    folder: Path
    expected: str = "equal"
    reference: Path | None = None
    """The checkpoint without the fault; None: the same."""

    @property
    def layout(self) -> str:
        """`model_type` of its config.json."""
        return str(json.loads((self.folder / "config.json").read_text(encoding="utf-8"))["model_type"])


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What one version of transformers says of given tokens, for positions 1, 2, ..."""

    version: str
    logprobs: Sequence[float]
    argmax: Sequence[int]


def compare(case: Case, answer: Completion, references: Sequence[Reference], engine: str) -> list[Row]:
    """Return one row for each further transformers and one for the server; the first reference holds for all."""
    first, *others = references
    start = len(answer.prompt) - 1  # entry of the first generated token
    common = {"model": case.name, "layout": case.layout, "positions": len(first.logprobs)}
    rows = []
    if case.expected == "equal":
        for other in others:
            same = sum(a == b for a, b in zip(first.argmax[start:], other.argmax[start:], strict=True))
            rows.append(
                Row(
                    **common,
                    engine=f"transformers {other.version}",
                    difference=largest_difference(first.logprobs, other.logprobs),
                    greedy=f"{same}/{len(answer.generated)}",
                )
            )
    same = sum(a == b for a, b in zip(first.argmax[start:], answer.generated, strict=True))
    rows.append(
        Row(
            **common,
            engine=engine,
            difference=largest_difference(first.logprobs, answer.logprobs),
            greedy=f"{same}/{len(answer.generated)}",
            expected=case.expected,
        )
    )
    return rows


def largest_difference(one: Sequence[float], two: Sequence[float]) -> float:
    """Return the largest absolute difference; NaN if any number of either is not finite."""
    assert len(one) == len(two), f"{len(one)} log-probabilities against {len(two)}"
    differences = [abs(a - b) for a, b in zip(one, two, strict=True)]
    return max(differences) if all(map(math.isfinite, differences)) else math.nan


def markdown(rows: Sequence[Row]) -> list[str]:
    """Return the table's lines."""
    lines = [
        f"transformers {version('transformers')} is what the others are held to.",
        "",
        "| model | layout | engine | positions | largest difference | greedy tokens equal | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        difference = "not a number" if math.isnan(row.difference) else f"{row.difference:.1e}"
        cells = (row.model, row.layout, row.engine, row.positions, difference, row.greedy, row.verdict)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def sglang_markdown(rules: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the lines on SGLang."""
    lines = ["| export | SGLang's loading rules |", "|---|---|"]
    return lines + [
        f"| {name} | {problems[0] if problems else 'all kept'} |" for name, problems in rules.items()
    ]


def write_docs(page: Path, table: str) -> None:
    """Put the table between its marks on the page."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    write_text(page, f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")


def unserved(case: Case, engine: str) -> Row:
    """Return the row of a fault on purpose that made the server refuse the request."""
    return Row(
        model=case.name,
        layout=case.layout,
        engine=engine,
        positions=0,
        difference=math.nan,
        greedy="",
        expected=case.expected,
    )

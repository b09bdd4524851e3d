"""The result of `l0moe bench` as a table: one row for each engine and mode."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

HEADER = (
    "engine",
    "mode",
    "dense, ms",
    "L0-MoE, ms",
    "dense / L0-MoE",
    "bound: active",
    "bound: bytes",
    "experts read",
)
LEGEND = (
    "ms: median of a pass (decode: of one step). dense / L0-MoE: median and quartiles of the pairs' ratios; above 1 "
    "the L0-MoE is faster. Bounds: ratio of multiplications, and of weights read once. Experts read: distinct experts "
    "of a layer in one pass under uniform routing; in brackets with the routing that was measured."
)


def rows(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of each row."""
    for engine, measured in result["engines"].items():
        for name, mode in measured["modes"].items():
            passes = mode["tokens"] if name.startswith("decode") else 1
            ratio, bounds, experts = mode["ratio"], mode["bounds"], mode["distinct_experts"]
            bytes_read = f"{bounds['bytes']:.2f}"
            if "bytes_measured_routing" in bounds:
                bytes_read += f" ({bounds['bytes_measured_routing']:.2f})"
            distinct = f"{experts['uniform']:.1f}"
            if "measured" in experts:
                distinct += f" ({experts['measured']:.1f})"
            yield (
                engine,
                name,
                _milliseconds(mode["dense"], passes),
                _milliseconds(mode["l0moe"], passes),
                f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]",
                f"{bounds['active']:.2f}",
                bytes_read,
                distinct,
            )


def rich_table(result: Mapping[str, Any]) -> Table:
    """Return the table for a terminal."""
    table = Table(caption=f"{_machine(result)}. {LEGEND}", caption_justify="left")
    for place, title in enumerate(HEADER):
        table.add_column(title, justify="right" if place > 1 else "left")
    for row in rows(result):
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    return table


def markdown(result: Mapping[str, Any]) -> str:
    """Return the table and, if there are any, the profiles as Markdown."""
    lines = [_line(HEADER), _line(["---"] * 2 + ["---:"] * (len(HEADER) - 2)), *map(_line, rows(result))]
    lines += ["", f"{_machine(result)}. {LEGEND}"]
    for engine, measured in result["engines"].items():
        for mode, models in measured.get("profiles", {}).items():
            for model, profile in models.items():
                shares = ", ".join(f"{name} {share:.0%}" for name, share in profile["shares"].items())
                lines += [
                    "",
                    f"{engine}, {mode}, {model}: {profile['seconds']:.2f} s of operations: {shares}.",
                ]
    return "\n".join(lines) + "\n"


def _milliseconds(model: Mapping[str, Any], passes: int) -> str:
    cell = f"{1000 * model['seconds']['median'] / passes:.1f}"
    if "joules_per_token" in model:
        cell += f", {model['joules_per_token']['median']:.3g} J/token"
    return cell


def _machine(result: Mapping[str, Any]) -> str:
    hardware, settings = result["hardware"], result["settings"]
    engines = [
        f"{engine} ({', '.join(f'{name} {number}' for name, number in measured['versions'].items())})"
        for engine, measured in result["engines"].items()
    ]
    return (
        f"{hardware['cpu']}, {hardware['device']}, {hardware['threads']} thread(s), {settings['dtype']}, "
        f"{settings['repeats']} pairs; {'; '.join(engines)}"
    )


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"

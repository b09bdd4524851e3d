"""The folders of results: held-out perplexity, training and speed of each model, and nothing larger.

| folder | file | written by |
|---|---|---|
| `results/NAME` | `result.json` | `measure` of methods_step.py |
| `results/training/NAME` | `training.json` | training_record.py |
| `results/speed/NAME` | `speed.json` | speed_step.py |
| `results/control/NAME` | `control.json` | control_step.py |
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from runs_table import RunsTable
from settings import Place
from steps import do

from megatron_l0moe.reports.collect import Json
from megatron_l0moe.runs.stage_folder import StageFolder, read_manifest, write_json

BASE = "base"
HELDOUT, TRAINING, SPEED, CONTROL = "result.json", "training.json", "speed.json", "control.json"
FOLDERS = {HELDOUT: ".", TRAINING: "training", SPEED: "speed", CONTROL: "control"}


@dataclass(frozen=True)
class Result:
    """One measured model."""

    row: str
    seed: int | None
    values: Json
    manifest: Json
    training: Json = field(default_factory=dict)
    """Empty where it was not recorded."""
    speed: Json = field(default_factory=dict)
    """Empty where it was not timed."""


def folder(place: Place, name: str, file: str) -> Path:
    """Return where a model's result of one kind lies."""
    return place.root / "results" / FOLDERS[file] / name


def save(
    place: Place, name: str, file: str, asked: str, inputs: tuple[Path, ...], work: Callable[[], Json]
) -> None:
    """Write a result, if it is not there."""

    def write(out: Path) -> dict[str, object]:
        write_json(out / file, work())
        return {}

    title = name if file == HELDOUT else f"{FOLDERS[file]} of {name}"
    do(StageFolder(title, folder(place, name, file), asked, inputs), "clear", write)


def read_base(place: Place) -> Result | None:
    """Return the base's results, or None where it has not been measured."""
    return _read(place, BASE, None, BASE)


def read_results(place: Place, table: RunsTable) -> list[Result]:
    """Return what has been measured of the table's rows, in their order and by seed."""
    found = [_read(place, case.row, case.seed, case.name) for case in table.cases()]
    rows = list(table.rows)
    return sorted((result for result in found if result), key=lambda result: rows.index(result.row))


def read_controls(place: Place) -> list[Json]:
    """Return what each control of the retention did, by name and seed."""
    return [_json(file) for file in sorted(folder(place, "", CONTROL).glob(f"*/{CONTROL}"))]


def _read(place: Place, row: str, seed: int | None, name: str) -> Result | None:
    manifest = read_manifest(folder(place, name, HELDOUT))
    if not manifest:
        return None
    values, training, speed = (_json(folder(place, name, file) / file) for file in (HELDOUT, TRAINING, SPEED))
    return Result(row, seed, values, manifest, training, speed)


def _json(file: Path) -> Json:
    if not read_manifest(file.parent):  # never begun, or not finished
        return {}
    value: Json = json.loads(file.read_text(encoding="utf-8"))
    return value

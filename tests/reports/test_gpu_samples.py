"""Samples of made-up GPUs, in the summary and on the page."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_l0moe.reports.collect import collect, read_gpu_samples
from megatron_l0moe.reports.page import render
from megatron_l0moe.reports.plots import draw
from megatron_l0moe.reports.summary import build_summary, deterministic_part


def write(
    run: Path, folder: str, samples: list[tuple[float, str, float | None, float]], tail: str = ""
) -> None:
    """Write (time, GPU, power, memory) of one host."""
    file = run / folder / "gpu" / "host.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = [
        {"time": time, "gpu": gpu, "power": power, "memory": memory, "utilization": 50}
        for time, gpu, power, memory in samples
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def test_numbers_by_hand(tmp_path: Path) -> None:
    hour = 3600.0
    samples = [
        (0.0, "0", 100.0, 1e9), (hour, "0", 300.0, 3e9),  # 200 W for an hour
        (0.0, "1", 500.0, 2e9), (hour, "1", 500.0, 2e9), (2 * hour, "1", 500.0, 2e9),  # 500 W for two
        (100 * hour, "1", 500.0, 2e9),  # a later attempt: the pause does not count
    ]  # fmt: skip
    write(tmp_path, "moe", samples, tail='{"time": 7')
    found = read_gpu_samples(tmp_path)
    assert found == {
        "moe": {
            "gpus": 2,
            "samples": 6,
            "unreadable_lines": 1,
            "mean_power": pytest.approx(400.0),
            "largest_power": 500.0,
            "largest_memory": 3.0,
            "mean_utilization": 50.0,
            "energy": pytest.approx(0.2 + 1.0),
        }
    }


def test_experts_are_counted_together(tmp_path: Path) -> None:
    write(tmp_path, "experts/000", [(0.0, "0", None, 1e9)])
    write(tmp_path, "experts/001", [(9.0, "0", None, 5e9)])
    numbers = read_gpu_samples(tmp_path)["experts"]
    assert (numbers["gpus"], numbers["samples"], numbers["largest_memory"]) == (1, 2, 5.0)
    assert numbers["mean_power"] is None
    assert numbers["energy"] is None


def test_page_shows_them_only_where_they_are(made_up_run) -> None:
    recipe, run = made_up_run
    without = build_summary(collect(recipe, run))
    assert without["gpu_samples"] == {}
    assert "kWh" not in render(without, draw(without))
    write(run, "moe", [(0.0, "0", 612.3, 7e10), (30.0, "0", 612.3, 7e10)])
    summary = build_summary(collect(recipe, run))
    page = render(summary, draw(summary))
    assert 'data-key="/gpu_samples/moe/mean_power" data-form="one">612.3<' in page
    assert deterministic_part(summary) == deterministic_part(without)

"""The calibration pass in TP2, TP2 + SP, DP2 and PP2 equals one process, on real gloo processes."""

import json
from pathlib import Path

import pytest
from processes import torchrun

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

PROGRAM = Path(__file__).with_name("calibration_world.py")
# relative to the largest number; float32 activations and sums in another order
FLOAT32_RTOL = 1e-5
LAUNCH_SECONDS = 300
FAULT = "DP2, sums not added"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration")
    for processes in (1, 2):
        torchrun(processes, PROGRAM, folder, log=folder / f"{processes}.log", timeout=LAUNCH_SECONDS)
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("layout", ["DP2", "TP2", "TP2 + SP", "PP2"])
def test_layouts_give_the_sums_of_one_process(results, layout):
    assert results[layout]["missing"] == []
    assert results[layout]["compared"] > 9
    assert results[layout]["difference"] < FLOAT32_RTOL


def test_sums_that_are_not_added_show(results):
    assert results[FAULT]["difference"] > 1000 * FLOAT32_RTOL

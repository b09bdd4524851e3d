"""The calibration pass in TP2, TP2 + SP, DP2 and PP2 equals one process, on real gloo processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
        ]
        log = folder / f"{processes}.log"
        with log.open("w", encoding="utf-8") as output:
            done = subprocess.run(
                [*command, str(PROGRAM), str(folder)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": f"{PROGRAM.parents[2]}:{PROGRAM.parents[1]}",
                },
                check=False,
                timeout=LAUNCH_SECONDS,
            )
        assert done.returncode == 0, log.read_text(encoding="utf-8")[-6000:]
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("layout", ["DP2", "TP2", "TP2 + SP", "PP2"])
def test_layouts_give_the_sums_of_one_process(results, layout):
    assert results[layout]["missing"] == []
    assert results[layout]["compared"] > 9
    assert results[layout]["difference"] < FLOAT32_RTOL


def test_sums_that_are_not_added_show(results):
    assert results[FAULT]["difference"] > 1000 * FLOAT32_RTOL

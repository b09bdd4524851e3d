"""Conversions hold a block of rows, `assemble` an expert, whatever the size; measured in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self"),
]
ROOT = Path(__file__).parents[2]
MB = 1e6
# What a process needs beside the tensors: the allocator's holes, and what torch imports when it first writes.
OTHER = 12 * MB  # seen: 6 MB
OTHER_ASSEMBLE = (
    20 * MB
)  # seen: 9 to 13 MB beside weights, 7 to 13 MB beside unit lists, differing from run to run


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, float]:
    """Sizes, and peaks above the memory before, in bytes."""
    script = Path(__file__).with_name("peak_memory.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path_factory.mktemp("memory"))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("what", ["convert", "export"])
def test_a_conversion_holds_a_few_blocks_and_not_a_tensor(measured, what):
    bound = 3 * measured["block"] + OTHER  # q, k and v of a few groups, then joined
    assert measured["files"] > 3
    assert measured[what] < bound, measured
    assert 2 * bound < measured["largest tensor"] < measured["model"] / 3
    for control in ("whole tensors", "whole model"):
        assert measured[f"{what}, {control}"] > 2 * bound, measured


@pytest.mark.parametrize("kind", ["weights", "units"])
def test_assemble_holds_one_expert_and_not_the_experts_of_a_layer(measured, kind):
    bound = 3 * measured["expert"] + 3 * measured["block"] + OTHER_ASSEMBLE
    if kind == "units":
        bound += measured["dense mlp"]
    assert measured[f"assemble, {kind}"] < bound, measured
    assert 1.5 * bound < measured["experts of a layer"]
    assert measured["assemble, a layer read first"] > 1.5 * bound, measured

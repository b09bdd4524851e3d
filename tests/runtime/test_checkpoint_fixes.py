"""A bf16 optimizer with float32 parameters saves and loads with our workaround, and does not without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("fix", ["with", "without"])
def test_float32_parameters_in_a_bf16_optimizer(fix, tmp_path):
    program = Path(__file__).with_name("save_and_load.py")
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "checkpoint"), fix],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": tests},
        check=False,
        timeout=180,
    )
    if fix == "with":
        assert "equal 8" in done.stdout, done.stderr[-2000:]  # 2 layers: fc1, fc2, log_alpha, lambdas
    else:
        assert "does not match any model sharded param" in done.stderr

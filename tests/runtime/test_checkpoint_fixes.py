"""Optimizers save and load with our workarounds, and do not, or wrongly, with one of them left out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_l0moe.runtime import checkpoint_fixes

pytestmark = pytest.mark.slow  # most cases start a process with Megatron


def run(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return subprocess.run(
        [sys.executable, str(Path(__file__).with_name(program)), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": tests},
        check=False,
        timeout=240,
    )


@pytest.mark.parametrize("fix", ["with", "without", "manager"])
def test_float32_parameters_in_a_bf16_optimizer(fix, tmp_path):
    """The last case leaves out `keep_results_here` alone: Megatron's manager process is there then."""
    done = run("save_and_load.py", str(tmp_path / "checkpoint"), fix)
    if fix == "without":
        assert "does not match any model sharded param" in done.stderr
    else:
        processes = int(fix == "manager")
        # 2 layers: fc1, fc2, log_alpha, lambdas
        assert f"equal 8 processes {processes}" in done.stdout, done.stderr[-2000:]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a resumed distributed optimizer does with all workarounds but one."""
    done = run("distributed_optimizer_resume.py", str(tmp_path_factory.mktemp("distributed")))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("form", "left_out", "outcome"),
    [
        ("fully_reshardable", "none left out", "equal"),
        ("fully_reshardable", "fresh_distributed_optimizer_has_a_step", "AssertionError: "),
        ("fully_reshardable", "step_is_no_parameter_state", "KeyError: 'step'"),
        ("fully_reshardable", "parameters_do_not_share_a_step", "different"),
        ("dp_reshardable", "none left out", "equal"),
        ("dp_reshardable", "fresh_distributed_optimizer_has_a_step", "AssertionError: "),
        ("dp_reshardable", "step_is_no_parameter_state", "different"),
        ("dp_reshardable", "parameters_do_not_share_a_step", "different"),
        (
            "dp_reshardable",
            "loading_needs_no_gradient",
            "RuntimeError: a view of a leaf Variable that requires grad",
        ),
    ],
)
def test_a_resumed_distributed_optimizer(outcomes, precision, form, left_out, outcome):
    assert outcomes[f"{precision} {form} {left_out}"].startswith(outcome)


def test_every_workaround_is_left_out_in_some_test():
    """The last one, of ranks without parameters, needs two ranks: tests/distributed/test_resume.py."""
    assert [workaround.__name__ for workaround in checkpoint_fixes.WORKAROUNDS] == [
        "fp32_parameters_in_float16_optimizer",
        "fresh_distributed_optimizer_has_a_step",
        "step_is_no_parameter_state",
        "parameters_do_not_share_a_step",
        "loading_needs_no_gradient",
        "ranks_without_parameters_know_the_step",
    ]


def test_with_another_adam_nothing_of_torchs_is_touched(monkeypatch):
    touched = []
    monkeypatch.setattr(checkpoint_fixes, "uses_torch_adam", lambda: False)
    checkpoint_fixes.for_torch_adam(lambda: touched.append(1))()
    assert not touched
    monkeypatch.setattr(checkpoint_fixes, "uses_torch_adam", lambda: True)
    checkpoint_fixes.for_torch_adam(lambda: touched.append(1))()
    assert touched

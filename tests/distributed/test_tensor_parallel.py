"""The gated MLP on two real gloo processes with tensor and sequence parallelism, stochastic gates on.

One process writes weights and gradients; two load the weights and must find the same loss and the same gradients of
masks, lambdas and MLP weights. The full matrix of layouts is wider than this test.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

FP32_SUM_ORDER_ATOL = 1e-6  # other reduction order under TP; gradients here are of size 1e-2
CONTROLS = ("lagrangian", "budget")
PROGRAM = Path(__file__).with_name("tensor_parallel_step.py")


def launch(processes: int, folder: Path, control: str, noise: str = "") -> list[dict]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    done = subprocess.run(
        [*command, str(PROGRAM), str(folder), control, *([noise] if noise else [])],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{control}{noise}_tp{processes}_rank{rank}.pt") for rank in range(processes)]


def joined(name: str, shards: list[Tensor]) -> Tensor:
    """Put the shards of a parameter's gradient together as one process holds it."""
    if name.endswith("linear_fc1.weight"):  # each rank holds [gate; up] of its channels
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    if name.endswith("linear_fc2.weight"):
        return torch.cat(shards, dim=1)
    if name.endswith("log_alpha"):
        return torch.cat(shards)
    return torch.stack(shards)  # the same on every rank: compared with each


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tp")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, dict]:
    return {control: launch(1, folder, control)[0] for control in CONTROLS}


def largest_difference(one: dict, two: list[dict]) -> float:
    names = set(one["gradients"])
    assert names == set(two[0]["gradients"])
    assert {name.rsplit(".", 1)[-1] for name in names} >= {"log_alpha", "weight"}
    return max(
        float((gradient - joined(name, [rank["gradients"][name] for rank in two])).abs().max())
        for name, gradient in one["gradients"].items()
        if "layernorm" not in name
    )


@pytest.mark.parametrize("control", CONTROLS)
def test_two_ranks_equal_one(one, folder, control):
    two = launch(2, folder, control)
    assert two[0]["loss"] == pytest.approx(one[control]["loss"], abs=FP32_SUM_ORDER_ATOL)
    assert largest_difference(one[control], two) < FP32_SUM_ORDER_ATOL


def test_noise_keyed_by_rank_would_be_seen(one, folder):
    two = launch(2, folder, "lagrangian", "rank-noise")
    assert largest_difference(one["lagrangian"], two) > FP32_SUM_ORDER_ATOL

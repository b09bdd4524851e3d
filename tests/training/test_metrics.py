"""What TensorBoard and W&B are told of a record; the writers are made up.

Tokens a second and MFU: the FLOPs of a command line are those of the plan; the driver is made up, no GPU is used.
"""

import argparse
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from megatron.training.arguments import add_megatron_arguments
from toy_recipe import make_run, toy_architecture

from megatron_l0moe.chain import training_commands
from megatron_l0moe.sizes.flops import Recompute, stage_model, training_flops
from megatron_l0moe.sizes.gpu_models import DEVICE_NAMES, GPUS, gpu_of_device
from megatron_l0moe.training import arguments, metrics

MOE: dict[str, Any] = {
    "iteration": 4,
    "lm_loss": 3.0,
    "tokens_per_second": 1000.0,
    "mfu": None,
    "load": {"1": [0.5, 0.25, 0.25, 0.0], "2": [0.25, 0.25, 0.25, 0.25]},
    "domain_load": [[1.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0], [0.25] * 4, [0.25] * 4],
    "own_expert": {"1": 0.4, "2": 0.6},
    "balance_loss": 0.1,
    "z_loss": 2.0,
}
EXPERT: dict[str, Any] = {
    "tokens_per_second": 10.0,
    "mfu": 0.4,
    "retention_target": 0.5,
    "frozen": True,
    "retention": {"2": 0.5, "3": 0.7},
    "lambda1": {"2": 1.0, "3": -1.0},
    "lambda2": {"2": 0.0, "3": 4.0},
}


def test_moe_record() -> None:
    values = metrics.scalars(MOE)
    assert values["l0moe/load_max/layer_1"] == 0.5
    assert values["l0moe/load_min/mean"] == 0.125
    # 0.5 log 2 + 2 * 0.25 log 4 = 1.5 log 2, in units of log 4 = 2 log 2
    assert values["l0moe/load_entropy/layer_1"] == pytest.approx(0.75)
    assert values["l0moe/load_entropy/mean"] == pytest.approx(0.875)
    assert [values[f"l0moe/own_expert/domain_{d}"] for d in range(4)] == [1.0, 0.5, 0.25, 0.25]
    assert [values[f"l0moe/domain_entropy/domain_{d}"] for d in range(4)] == pytest.approx([0, 0.5, 1, 1])
    assert values["l0moe/own_expert/mean"] == pytest.approx(0.5)
    assert (values["l0moe/balance_loss"], values["l0moe/z_loss"]) == (0.1, 2.0)
    assert "l0moe/mfu" not in values  # unknown
    assert not any("lm_loss" in name for name in values)  # Megatron's own


def test_expert_record() -> None:
    assert metrics.scalars(EXPERT) == pytest.approx(
        {
            "l0moe/retention_target": 0.5,
            "l0moe/frozen": 1.0,
            "l0moe/tokens_per_second": 10.0,
            "l0moe/mfu": 0.4,
            "l0moe/retention/mean": 0.6,
            "l0moe/retention/layer_2": 0.5,
            "l0moe/retention/layer_3": 0.7,
            "l0moe/lambda1/mean": 0.0,
            "l0moe/lambda1/layer_2": 1.0,
            "l0moe/lambda1/layer_3": -1.0,
            "l0moe/lambda2/mean": 2.0,
            "l0moe/lambda2/layer_2": 0.0,
            "l0moe/lambda2/layer_3": 4.0,
        }
    )


def test_scalars_stay_few_with_many_experts() -> None:
    """32 layers and 64 experts have 2048 loads in a layer and 4096 by domain."""
    even = [1 / 64] * 64
    layers = [str(layer) for layer in range(32)]
    record = {
        "load": dict.fromkeys(layers, even),
        "domain_load": [even] * 64,
        "own_expert": dict.fromkeys(layers, 1 / 64),
    }
    assert len(metrics.scalars(record)) < 300


def test_domains_without_an_expert_each() -> None:
    values = metrics.scalars({"domain_load": [[0.5, 0.5], [0.0, 1.0], [1.0, 0.0]]})  # 3 domains, 2 experts
    assert values.keys() == {f"l0moe/domain_entropy/domain_{d}" for d in range(3)}


class Writers:
    """Both of Megatron's writers."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.calls.append((name, value, step))

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append((values, step))


def test_each_writer_alone() -> None:
    values = {"l0moe/mfu": 0.4, "l0moe/frozen": 0.0}
    board, wandb = Writers(), Writers()
    metrics.send(values, 7, tensorboard=board, wandb=None)
    assert board.calls == [("l0moe/mfu", 0.4, 7), ("l0moe/frozen", 0.0, 7)]
    metrics.send(values, 7, tensorboard=None, wandb=wandb)
    assert wandb.calls == [(values, 7)]  # one call a step: W&B counts steps by calls


def test_entropy() -> None:
    assert metrics.entropy([1.0, 0.0]) == 0.0
    assert metrics.entropy([0.5, 0.5]) == pytest.approx(1.0)
    assert metrics.entropy([0.9, 0.1]) == pytest.approx(-(0.9 * math.log2(0.9) + 0.1 * math.log2(0.1)))
    assert metrics.entropy([1.0]) == 0.0


GPU = "NVIDIA H100 80GB HBM3"


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return arguments.add_l0_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def parsed(parser: argparse.ArgumentParser, folder: Path, stage: str, **changes: Any) -> Any:
    """Return Megatron's arguments and our settings of a recipe's job."""
    run = make_run(folder, **changes)
    job = (
        training_commands.moe_job(run, toy_architecture())
        if stage == "moe"
        else training_commands.expert_job(run, toy_architecture(), 0)
    )
    args = parser.parse_args(job.command[job.command.index(training_commands.PRETRAIN) + 1 :])
    args.padded_vocab_size, args.world_size = args.vocab_size, 4  # Megatron's checks fill these in
    return args, arguments.settings_from_args(args)


@pytest.mark.parametrize(("stage", "weights"), [("moe", True), ("expert", True), ("expert", False)])
def test_flops_are_those_of_the_plan(
    parser: argparse.ArgumentParser, tmp_path: Path, stage: Any, weights: bool
) -> None:
    args, settings = parsed(parser, tmp_path, stage, expert_training__train_weights=weights)
    planned = stage_model(
        toy_architecture(),
        stage,
        dense_layers=1,
        num_experts=4,
        expert_ffn=16,
        top_k=2,
        trains_weights=weights,
    )
    got = metrics.flops_per_token(args, settings)
    assert got == training_flops(planned, 32, Recompute()).model
    other = "expert" if stage == "moe" else "moe"
    planned = stage_model(toy_architecture(), other, dense_layers=1, num_experts=4, expert_ffn=16, top_k=2)
    assert got != training_flops(planned, 32, Recompute()).model  # control


def test_mfu_by_hand(
    parser: argparse.ArgumentParser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "gpu_name", lambda: GPU)
    monkeypatch.setattr(metrics, "flops_per_token", lambda args, settings: 1e9)
    args, settings = parsed(parser, tmp_path, "moe")
    # 4 GPUs of 989.4e12; 2e6 tokens a second of 1e9 FLOPs are 2e15 of 3.9576e15
    speed = metrics.Throughput(args, settings).of_step(tokens=4_000_000, seconds=2.0)
    assert speed == {"tokens_per_second": 2e6, "mfu": pytest.approx(2 / 3.9576, abs=1e-5)}


@pytest.mark.parametrize(
    ("name", "reason"),
    [(None, "there is no GPU"), ("NVIDIA H100 PCIe", "the peak of NVIDIA H100 PCIe is not known")],
)
def test_without_a_peak_it_is_said_once(
    parser: argparse.ArgumentParser,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str | None,
    reason: str,
) -> None:
    monkeypatch.setattr(metrics, "gpu_name", lambda: name)
    with caplog.at_level(logging.WARNING):
        speed = metrics.Throughput(*parsed(parser, tmp_path, "moe"))
        assert [speed.of_step(100, 2.0) for _ in range(2)] == [{"tokens_per_second": 50.0, "mfu": None}] * 2
    assert [record.message for record in caplog.records] == [f"MFU is not recorded: {reason}."]


def test_names_of_the_driver() -> None:
    assert gpu_of_device(GPU) is GPUS["h100"]
    assert gpu_of_device("NVIDIA H200") is GPUS["h200"]
    assert gpu_of_device("NVIDIA GH200 480GB") is None
    assert set(DEVICE_NAMES.values()) == set(GPUS)

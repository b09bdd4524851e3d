"""Tokens a second and MFU: the FLOPs of a command line are those of the plan; the driver is made up, no GPU is used."""

import argparse
import logging
from pathlib import Path
from typing import Any

import pytest
from megatron.training.arguments import add_megatron_arguments
from toy_recipe import make_run, toy_architecture

from megatron_l0moe.chain import training_commands
from megatron_l0moe.sizes.flops import Recompute, stage_model, training_flops
from megatron_l0moe.sizes.gpu_models import DEVICE_NAMES, GPUS, gpu_of_device
from megatron_l0moe.training import arguments, metrics

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

"""What TensorBoard and W&B are told of a record; the writers are made up."""

import math
from typing import Any

import pytest

from megatron_l0moe.training import metrics

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

"""Eq. 2 and its schedule: by hand, against the reference, and the signs of every gradient."""

import itertools
import math

import equations
import pytest
import torch

from megatron_l0moe.modules import retention as rt
from megatron_l0moe.modules.hard_concrete import HardConcreteConfig, open_probability
from megatron_l0moe.runtime import cpu

FLOAT32_ATOL = 1e-6  # a handful of float32 roundings of values below 1
BUDGET_ATOL = 1e-5  # a few float32 roundings of tau (below 40), times the slope of the mean
ROOT_ATOL = 1e-8  # three Newton steps in float64 from within 0.16: 0.012, 8e-5, 3e-9


def test_schedule_by_hand():
    config = rt.RetentionConfig(l0_open_steps=4, l0_retention_ramp=0.5, l0_freeze_fraction=0.2)
    steps = [rt.schedule_step(config, iteration=i, total=60, target=0.25) for i in range(60)]
    assert [s.phase for s in steps[:4]] == [rt.Phase.OPEN] * 4
    assert all(s.retention == 1.0 for s in steps[:4])
    # r leaves 1 after step 3, the last open one, and arrives at step 30: a fall of 0.75 / 27 a step
    assert steps[4].retention == pytest.approx(1 - 0.75 / 27)
    assert steps[12].retention == pytest.approx(1 - 0.75 * 9 / 27)  # a third of the way: 0.75
    assert steps[30].retention == steps[47].retention == pytest.approx(0.25)
    assert [s.phase for s in steps[47:49]] == [rt.Phase.LEARN, rt.Phase.FROZEN]  # 60 - 12 = 48
    assert all(a.retention >= b.retention for a, b in itertools.pairwise(steps))


def test_a_ramp_without_open_steps_starts_at_one_and_a_ramp_that_ends_within_them_is_over():
    config = rt.RetentionConfig(l0_open_steps=0, l0_retention_ramp=0.5, l0_freeze_fraction=0.0)
    assert rt.schedule_step(config, iteration=0, total=60, target=0.25).retention == 1.0
    config = rt.RetentionConfig(l0_open_steps=4, l0_retention_ramp=0.05, l0_freeze_fraction=0.0)
    assert rt.schedule_step(config, iteration=4, total=60, target=0.25).retention == 0.25


def test_no_freeze_fraction_never_freezes():
    config = rt.RetentionConfig(l0_freeze_fraction=0.0)
    assert rt.schedule_step(config, iteration=99, total=100, target=0.1).phase is rt.Phase.LEARN


def test_lagrangian_value_and_gradients_by_hand():
    # r-hat 0.6, r 0.4: 0.5 * 0.2 + 2 * 0.04 = 0.18; d/d r-hat = 0.5 + 2 * 2 * 0.2 = 1.3
    lambdas = torch.tensor([0.5, 2.0], requires_grad=True)
    estimate = torch.tensor(0.6, requires_grad=True)
    value = rt.lagrangian(lambdas, estimate, 0.4)
    value.backward()
    assert value.item() == pytest.approx(0.18, abs=FLOAT32_ATOL)
    assert value.item() == pytest.approx(equations.lagrangian(0.5, 2.0, 0.6, 0.4), abs=FLOAT32_ATOL)
    assert estimate.grad.item() == pytest.approx(1.3, abs=FLOAT32_ATOL)
    # ascent: a minimiser must see -(r-hat - r) and -(r-hat - r)^2
    assert lambdas.grad.tolist() == pytest.approx([-0.2, -0.04], abs=FLOAT32_ATOL)


@pytest.fixture
def group():
    from megatron.core import parallel_state

    with cpu.one_process_group():
        yield parallel_state.get_tensor_model_parallel_group()


@pytest.mark.parametrize("retention", [0.9, 0.25, 0.0714])
def test_exact_budget_holds_the_retention_and_sums_its_gradient_to_zero(group, retention):
    config = HardConcreteConfig()
    log_alpha = torch.randn(512, generator=torch.Generator().manual_seed(0)).mul(3).requires_grad_()
    tau = rt.budget_shift(log_alpha, retention, lambda x: open_probability(x, config), group)
    p = open_probability(log_alpha - tau, config)
    assert p.mean().item() == pytest.approx(retention, abs=BUDGET_ATOL)
    # r-hat is held whatever log_alpha does: its derivative with respect to every log_alpha is 0
    p.mean().backward()
    assert log_alpha.grad.abs().max().item() < BUDGET_ATOL


def bisected(values: list[float], budget: float) -> float:
    """The shift by which the mean of sigmoids falls to the budget, one halving after the other in float64."""
    low, high = -60.0, 60.0
    for _ in range(80):
        middle = (low + high) / 2
        mean = sum(1 / (1 + math.exp(middle - value)) for value in values) / len(values)
        low, high = (middle, high) if mean > budget else (low, middle)
    return low


@pytest.mark.parametrize("budget", [0.998, 0.5, 0.25, 0.07, 0.001])
@pytest.mark.parametrize(
    "values",
    [
        [3.0] * 8,  # the start of training
        [4.6] * 2 + [-10.0] * 6,  # all at the clamps: the mean is flat in between
        [-10.0, 4.6, 0.0, -3.0, 1.5, 2.0, -0.5, 4.0],
    ],
)
def test_exact_budget_finds_the_root_that_bisection_finds(group, values, budget):
    tau = rt.budget_shift(torch.tensor(values, dtype=torch.float64), budget, torch.sigmoid, group)
    assert tau.item() == pytest.approx(bisected(values, budget), abs=ROOT_ATOL)
    coarse = rt._bracket(torch.tensor(values, dtype=torch.float64), budget, torch.sigmoid)
    assert abs(coarse.item() - bisected(values, budget)) < 2 * rt.SHIFT_BOUND / rt.SECTIONS**rt.SECTION_ROUNDS


def test_exact_budget_gradient_equals_finite_differences(group):
    config = HardConcreteConfig()
    log_alpha = torch.tensor([0.3, -1.0, 2.0, 0.1, -0.4], dtype=torch.float64)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.7], dtype=torch.float64)

    def loss(x: torch.Tensor) -> torch.Tensor:
        tau = rt.budget_shift(x, 0.4, lambda y: open_probability(y, config), group)
        return (weights * torch.sigmoid(x - tau)).sum()

    x = log_alpha.clone().requires_grad_()
    loss(x).backward()
    epsilon = 1e-4
    for j in range(5):
        shift = torch.zeros(5, dtype=torch.float64)
        shift[j] = epsilon
        numeric = (loss(log_alpha + shift) - loss(log_alpha - shift)) / (2 * epsilon)
        assert x.grad[j].item() == pytest.approx(numeric.item(), abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l0_retention_ramp": 1.5}, r"l0_retention_ramp must lie in \[0, 1\], got 1.5"),
        ({"l0_freeze_fraction": 1.0}, r"l0_freeze_fraction must lie in \[0, 1\), got 1.0"),
        ({"l0_retention_ramp": 0.8, "l0_freeze_fraction": 0.3}, "must sum to at most 1"),
        ({"l0_expert_ffn": -1}, "l0_expert_ffn must be at least 1, got -1"),
    ],
)
def test_bad_settings_name_the_value_and_the_rule(change, message):
    with pytest.raises(ValueError, match=message):
        rt.RetentionConfig(**change)

"""Control of the retained fraction r of the FFN channels: schedule, Lagrangian (paper eq. 2, 6), exact budget."""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_l0moe.modules.tensor_parallel import copy_to_shards, gather_shards, mean_over_shards

SHIFT_BOUND = 40.0  # |log_alpha - tau|: sigmoid(40) is 1 in float32
SECTIONS, SECTION_ROUNDS = 16, 2  # an interval of 80 shrinks to 0.31 by two evaluations of a few big kernels
NEWTON_STEPS = 2
"""Enough: as |sigmoid''| <= |sigmoid'|, an error e becomes at most e**2 / 2: 0.16, 0.012, 8e-5, at last 3e-9."""
LARGEST_BUDGET = 0.998  # a budget of 1 would need log_alpha = infinity


class Phase(enum.Enum):
    """What the gates do in a step."""

    OPEN = "open"
    """Gates are 1: the dense network; the mean of each layer's router input is taken."""
    LEARN = "learn"
    """Gates are sampled and pulled to the scheduled retention."""
    FROZEN = "frozen"
    """Gates are the hard top-k mask; weights adapt to the expert exactly as it will be extracted."""


@dataclass(frozen=True, kw_only=True)
class RetentionConfig:
    """Retention target, its schedule, and the way it is enforced (paper eq. 2)."""

    l0_expert_ffn: int = 0
    """FFN channels that an expert keeps in every MoE layer, exactly; 0 means that no width was given."""
    l0_open_steps: int = 4
    """First steps with open gates, in which the mean of each layer's router input is taken."""
    l0_retention_ramp: float = 0.5
    """Fraction of the steps after which r has fallen linearly from 1 to its target (the paper: 0.2)."""
    l0_freeze_fraction: float = 0.1
    """Last fraction of the steps, trained with the hard top-k mask."""
    l0_retention_control: Literal["lagrangian", "budget"] = "budget"
    """budget: log_alpha shifted so that r-hat equals r. lagrangian: eq. 2 with a pair of lambdas per layer."""
    l0_retention_estimate: Literal["expected", "sampled"] = "expected"
    """r-hat of eq. 2: mean P(z != 0), or the mean of the sampled z as printed."""

    def __post_init__(self) -> None:
        if self.l0_expert_ffn < 0:
            raise ValueError(f"l0_expert_ffn must be at least 1, got {self.l0_expert_ffn}")
        if not 0 <= self.l0_retention_ramp <= 1:
            raise ValueError(f"l0_retention_ramp must lie in [0, 1], got {self.l0_retention_ramp}")
        if not 0 <= self.l0_freeze_fraction < 1:
            raise ValueError(f"l0_freeze_fraction must lie in [0, 1), got {self.l0_freeze_fraction}")
        if self.l0_retention_ramp + self.l0_freeze_fraction > 1:
            raise ValueError(
                f"l0_retention_ramp ({self.l0_retention_ramp}) and l0_freeze_fraction ({self.l0_freeze_fraction}) "
                "must sum to at most 1"
            )


@dataclass(frozen=True)
class GateStep:
    """Position of the gates in the schedule, the same for all layers and ranks."""

    iteration: int
    phase: Phase
    retention: float
    """r of eq. 2 in this step, (0, 1]."""
    penalty_scale: float
    """Factor on the penalty's gradient: 1 / micro-batches of the step."""


def schedule_step(
    config: RetentionConfig, *, iteration: int, total: int, target: float, penalty_scale: float = 1.0
) -> GateStep:
    """Return the gates' phase and r for an iteration: open, linear from 1 to ``target``, hold, frozen.

    r is 1 in the last open step and ``target`` from step ``total * l0_retention_ramp`` on.
    """
    freeze_start = total - round(total * config.l0_freeze_fraction)
    if iteration < config.l0_open_steps:
        return GateStep(iteration, Phase.OPEN, 1.0, penalty_scale)
    if iteration >= freeze_start and config.l0_freeze_fraction > 0:
        return GateStep(iteration, Phase.FROZEN, target, penalty_scale)
    start = max(config.l0_open_steps - 1, 0)
    ramp = max(round(total * config.l0_retention_ramp) - start, 1)
    progress = min((iteration - start) / ramp, 1.0)
    return GateStep(iteration, Phase.LEARN, 1.0 + (target - 1.0) * progress, penalty_scale)


class _ReverseGradient(torch.autograd.Function):
    """Identity whose gradient is negated, so that a minimising optimizer ascends (eq. 2 is a max over lambda)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def reverse_gradient(value: Tensor) -> Tensor:
    """Return ``value`` with its gradient negated."""
    result: Tensor = _ReverseGradient.apply(value)
    return result


def lagrangian(lambdas: Tensor, estimate: Tensor, retention: float) -> Tensor:
    """Return eq. 2, lambda_1 (r-hat - r) + lambda_2 (r-hat - r)^2, descending in r-hat and ascending in lambda.

    Args:
        lambdas: [2], lambda_1 and lambda_2.
        estimate: scalar r-hat.
        retention: scheduled r.
    """
    lambda_1, lambda_2 = reverse_gradient(lambdas).unbind()
    difference = estimate - retention
    return lambda_1 * difference + lambda_2 * difference**2


class RetentionController(MegatronModule):
    """Holds one layer's retention at the scheduled r.

    `lambdas` [2] float32 exists only under the Lagrangian; it is the same on all tensor-parallel ranks, since
    its gradient, r-hat - r, is.
    """

    def __init__(
        self,
        config: TransformerConfig,
        retention_config: RetentionConfig,
        target: float,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__(config)
        self.retention_config = retention_config
        self.target = target
        self.tp_group = tp_group
        self.uses_budget = retention_config.l0_retention_control == "budget"
        if not self.uses_budget:
            device = torch.cuda.current_device()
            self.lambdas = torch.nn.Parameter(torch.zeros(2, dtype=torch.float32, device=device))

    def penalty(self, open_probability: Tensor, z: Tensor, retention: float) -> Tensor | None:
        """Return eq. 2 for this layer; None under the exact budget, which needs no penalty."""
        if self.uses_budget:
            return None
        counted = open_probability if self.retention_config.l0_retention_estimate == "expected" else z
        return lagrangian(self.lambdas, mean_over_shards(counted, self.tp_group), retention)

    def shifted(self, log_alpha: Tensor, retention: float, probability: Callable[[Tensor], Tensor]) -> Tensor:
        """Return log_alpha - tau with mean(probability) == retention under the exact budget, else log_alpha."""
        if not self.uses_budget:
            return log_alpha
        return log_alpha - budget_shift(log_alpha, retention, probability, self.tp_group)


def budget_shift(
    log_alpha: Tensor,
    retention: float,
    probability: Callable[[Tensor], Tensor],
    tp_group: torch.distributed.ProcessGroup,
) -> Tensor:
    """Return tau such that mean over F of ``probability(log_alpha - tau)`` equals ``retention``; scalar.

    The root is sought without gradients; one more Newton step through the differentiable mean gives it the exact one.
    """
    budget = min(retention, LARGEST_BUDGET)
    with torch.no_grad():
        full = gather_shards(log_alpha, tp_group)
        tau = _bracket(full, budget, probability)
        for _ in range(NEWTON_STEPS):
            p = probability(full - tau)
            tau = tau + (p.mean() - budget) / _slope(p)
        slope = _slope(probability(full - tau))
    mean = mean_over_shards(probability(log_alpha - tau), tp_group)
    # every rank uses tau for its own shard, so tau's gradient is the sum of theirs
    return copy_to_shards(tau + (mean - budget) / slope, tp_group)


def _bracket(full: Tensor, budget: float, probability: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the middle of an interval of tau around the root; the mean falls as tau grows. [F] -> scalar."""
    fractions = torch.linspace(0.0, 1.0, SECTIONS + 1, dtype=full.dtype, device=full.device)
    low, width = full.new_tensor(-SHIFT_BOUND), 2 * SHIFT_BOUND
    for _ in range(SECTION_ROUNDS):
        grid = low + width * fractions
        too_many = probability(full - grid[:, None]).mean(dim=1) > budget
        low = grid[too_many.sum().clamp(1, SECTIONS) - 1]
        width /= SECTIONS
    return low + width / 2


def _slope(p: Tensor) -> Tensor:
    """Return -d mean / d tau of sigmoids ``p``; scalar, bounded away from 0."""
    return (p * (1 - p)).mean().clamp_min(1e-6)

"""The hard concrete gate over the FFN channels of one layer (paper eq. 1; Louizos et al., 2018).

Shapes: F = FFN channels of the layer (global), p = tensor-parallel size. `log_alpha` lives as F/p on each rank,
channel j of rank r being global channel r * F/p + j. All gate arithmetic is float32, also in bf16 models.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

from megatron_l0moe.modules.retention import GateStep, Phase, RetentionConfig, RetentionController
from megatron_l0moe.modules.tensor_parallel import gather_shards, keyed_generator
from megatron_l0moe.modules.trained_part import LAMBDA_GROUP, MASK_GROUP, Metrics, Schedule, TrainedPart

UNIFORM_EPSILON = 1e-6  # keeps log(u) and log(1 - u) finite in float32


@dataclass(frozen=True, kw_only=True)
class HardConcreteConfig:
    """Hard concrete distribution of the gates (paper eq. 1)."""

    l0_temperature: float = 0.83
    """b of eq. 1: temperature of the concrete distribution, above 0."""
    l0_stretch_low: float = -0.1
    """gamma of eq. 1: lower end of the stretch interval, below 0."""
    l0_stretch_high: float = 1.1
    """zeta of eq. 1: upper end of the stretch interval, above 1."""
    l0_log_alpha_init: float = 3.0
    """Start value of log_alpha: gates begin almost open."""
    l0_log_alpha_min: float = -10.0
    """Lower clamp of log_alpha; a bound of -4.6 would put retentions below 0.07 out of reach."""
    l0_log_alpha_max: float = 4.6
    """Upper clamp of log_alpha."""
    l0_noise_seed: int = 1234
    """Seed of the gates' noise, which is keyed by seed, iteration and layer and by nothing else."""

    def __post_init__(self) -> None:
        if self.l0_temperature <= 0:
            raise ValueError(f"l0_temperature must be above 0, got {self.l0_temperature}")
        if self.l0_stretch_low >= 0:
            raise ValueError(
                f"l0_stretch_low must be below 0 so that exact zeros occur, got {self.l0_stretch_low}"
            )
        if self.l0_stretch_high <= 1:
            raise ValueError(
                f"l0_stretch_high must be above 1 so that exact ones occur, got {self.l0_stretch_high}"
            )
        if self.l0_log_alpha_min >= self.l0_log_alpha_max:
            raise ValueError(
                f"l0_log_alpha_min ({self.l0_log_alpha_min}) must be below l0_log_alpha_max ({self.l0_log_alpha_max})"
            )


def stretch_and_clip(s: Tensor, config: HardConcreteConfig) -> Tensor:
    """Map the concrete sample s in (0, 1) to the gate z in [0, 1]: the last two lines of eq. 1."""
    stretched = s * (config.l0_stretch_high - config.l0_stretch_low) + config.l0_stretch_low
    return stretched.clamp(0.0, 1.0)


def sample_gate(log_alpha: Tensor, u: Tensor, config: HardConcreteConfig) -> Tensor:
    """Return z of eq. 1 for uniform noise ``u``; all of shape [F/p], float32."""
    s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + log_alpha) / config.l0_temperature)
    return stretch_and_clip(s, config)


def deterministic_gate(log_alpha: Tensor, config: HardConcreteConfig) -> Tensor:
    """Return the gate without noise (u = 1/2), used for evaluation and for extraction; [F/p]."""
    return stretch_and_clip(torch.sigmoid(log_alpha / config.l0_temperature), config)


def open_probability(log_alpha: Tensor, config: HardConcreteConfig) -> Tensor:
    """Return P(z != 0) = sigmoid(log_alpha - b log(-gamma / zeta)) per channel, the expected L0 of one gate; [F/p]."""
    shift = config.l0_temperature * math.log(-config.l0_stretch_low / config.l0_stretch_high)
    return torch.sigmoid(log_alpha - shift)


def gate_noise(*, seed: int, iteration: int, layer: int, size: int, device: torch.device) -> Tensor:
    """Return u of eq. 1 for all F channels of a layer; the same on every rank of every layout.

    Keyed by (seed, iteration, layer) only, so that the noise does not depend on the layout, is the same under
    activation recomputation, and needs no generator state in checkpoints.
    """
    generator = keyed_generator(seed, iteration, layer, device=device)
    u = torch.rand(size, generator=generator, device=device, dtype=torch.float32)
    return u.clamp(UNIFORM_EPSILON, 1 - UNIFORM_EPSILON)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Return the indices of the ``k`` largest scores [F], ties going to the lower index; ascending int64 [k]."""
    return torch.sort(scores, descending=True, stable=True).indices[:k].sort().values


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """Return a 0/1 float32 mask of the ``k`` largest scores, ties going to the lower index; [F] -> [F]."""
    mask = torch.zeros_like(scores, dtype=torch.float32)
    mask[top_k(scores, k)] = 1.0
    return mask


class Float32State(MegatronModule):
    """A module whose parameters and buffers keep their dtype when the model around it is cast to bf16 or fp16.

    A step of a mask (0.3 / steps) or one count of tokens is smaller than bf16's spacing at their values.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> "Float32State":
        def keep_dtype(tensor: Tensor) -> Tensor:
            result: Tensor = fn(tensor)
            return tensor.to(result.device) if result.dtype != tensor.dtype else result

        super()._apply(keep_dtype, recurse)
        return self


class HardConcreteGate(Float32State, TrainedPart):
    """Gate, retention controller and router-input mean of one layer; everything that the expert stage adds.

    Args:
        config: Megatron's transformer config.
        gate_config: distribution of eq. 1.
        retention_config: eq. 2 and the schedule of r.
        layer: global index of the layer, from 0.
        local_width: F/p.
        tp_group: tensor-parallel group that shards F.
        dp_cp_group: data- and context-parallel group, over which the router-input mean is taken.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        gate_config: HardConcreteConfig,
        retention_config: RetentionConfig,
        layer: int,
        local_width: int,
        tp_group: torch.distributed.ProcessGroup,
        dp_cp_group: torch.distributed.ProcessGroup | None,
    ) -> None:
        super().__init__(config)
        self.gate_config = gate_config
        self.layer = layer
        self.tp_group = tp_group
        self.dp_cp_group = dp_cp_group
        self.local_width = local_width
        self.width = local_width * tp_group.size()
        self.kept = retention_config.l0_expert_ffn
        device = torch.cuda.current_device()
        self.log_alpha = torch.nn.Parameter(
            torch.full((local_width,), gate_config.l0_log_alpha_init, dtype=torch.float32, device=device)
        )
        for name, value in (("tensor_model_parallel", True), ("partition_dim", 0), ("partition_stride", 1)):
            setattr(self.log_alpha, name, value)
        self.controller = RetentionController(config, retention_config, self.kept / self.width, tp_group)
        self.register_buffer("hard_mask", torch.ones(local_width, dtype=torch.float32, device=device))
        self.register_buffer("frozen", torch.zeros(1, dtype=torch.int64, device=device))
        self.register_buffer(
            "input_mean", torch.zeros(config.hidden_size, dtype=torch.float32, device=device)
        )
        self.register_buffer("input_count", torch.zeros(1, dtype=torch.float32, device=device))
        self.step = GateStep(iteration=0, phase=Phase.LEARN, retention=1.0, penalty_scale=1.0)

    @torch.no_grad()
    def begin_iteration(self, step: GateStep) -> None:
        """Set the schedule's position; project log_alpha into its bounds; freeze the mask when its time comes."""
        self.step = step
        self.log_alpha.clamp_(self.gate_config.l0_log_alpha_min, self.gate_config.l0_log_alpha_max)
        if step.phase is Phase.FROZEN and not self.frozen.item():
            full = gather_shards(self.effective_log_alpha(), self.tp_group)
            self.hard_mask.copy_(self._shard(top_k_mask(full, self.kept)))
            self.frozen.fill_(1)

    def begin_step(self, schedule: Schedule) -> None:
        """Take the place in the schedule that the layer's own final retention gives it."""
        self.begin_iteration(schedule(self.controller.target))

    def parameter_groups(self) -> Iterator[tuple[torch.nn.Parameter, str]]:
        """Yield log_alpha, and the Lagrangian's lambdas where it has them."""
        return gate_parameter_groups(self)

    @classmethod
    def metrics(cls, parts: Sequence[Self]) -> Metrics:
        """Return r, r-hat and the lambdas by layer."""
        return gate_metrics(parts)

    @property
    def is_frozen(self) -> bool:
        """Whether the hard mask is in force; the buffer is asked only outside training, where it costs no step time."""
        return self.step.phase is Phase.FROZEN or (not self.training and bool(self.frozen.item()))

    def effective_log_alpha(self) -> Tensor:
        """Return log_alpha, shifted to the exact budget where that control is chosen; [F/p]."""
        return self.controller.shifted(self.log_alpha, self.step.retention, self._open_probability)

    def forward(self) -> Tensor:
        """Return the gate z of this step; [F/p], float32."""
        if self.is_frozen:
            mask: Tensor = self.hard_mask
            return mask
        if self.step.phase is Phase.OPEN:
            return torch.ones_like(self.hard_mask)
        log_alpha = self.effective_log_alpha()
        if not self.training:
            return deterministic_gate(log_alpha, self.gate_config)
        u = gate_noise(
            seed=self.gate_config.l0_noise_seed,
            iteration=self.step.iteration,
            layer=self.layer,
            size=self.width,
            device=log_alpha.device,
        )
        return sample_gate(log_alpha, self._shard(u), self.gate_config)

    def penalty(self, z: Tensor) -> Tensor | None:
        """Return eq. 2 for this layer, or None where the step has no penalty; scalar float32."""
        if self.step.phase is not Phase.LEARN:
            return None
        return self.controller.penalty(self._open_probability(self.log_alpha), z, self.step.retention)

    @torch.no_grad()
    def expected_retention(self) -> float:
        """Return r-hat as it is logged: mean over F of P(z != 0), or of the hard mask once frozen."""
        if self.is_frozen:
            return float(gather_shards(self.hard_mask, self.tp_group).mean())
        open_probability = self._open_probability(self.effective_log_alpha())
        return float(gather_shards(open_probability, self.tp_group).mean())

    def observe_input(self, hidden_states: Tensor) -> None:
        """Add the layer's input to the domain mean that later initialises the router.

        Args:
            hidden_states: [s, b, h], the normalised input of the MLP; with sequence parallelism s is local.
        """
        # Under recomputation a layer runs twice, the first time without gradients: each token counts once.
        if not (self.training and torch.is_grad_enabled() and self.step.phase is Phase.OPEN):
            return
        total = hidden_states.detach().reshape(-1, hidden_states.shape[-1]).float()
        summed = torch.cat([total.sum(0), total.new_tensor([total.shape[0]])])
        # without sequence parallelism all tensor-parallel ranks hold the same tokens
        tp_group = self.tp_group if self.config.sequence_parallel else None
        for group in (tp_group, self.dp_cp_group):
            if group is not None and group.size() > 1:
                torch.distributed.all_reduce(summed, group=group)
        count = summed[-1:]
        self.input_count += count
        self.input_mean += (summed[:-1] / count - self.input_mean) * (count / self.input_count)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        """Shard log_alpha and hard_mask over F like fc2's input; the rest is replicated."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"log_alpha": 0, "hard_mask": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )

    def _shard(self, full: Tensor) -> Tensor:
        rank = self.tp_group.rank()
        return full[rank * self.local_width : (rank + 1) * self.local_width]

    def _open_probability(self, log_alpha: Tensor) -> Tensor:
        return open_probability(log_alpha, self.gate_config)


class ScheduledGate(Protocol):
    """What the gates that follow the schedule of r have in common."""

    layer: int
    step: GateStep
    controller: RetentionController
    log_alpha: torch.nn.Parameter

    @property
    def is_frozen(self) -> bool:
        """Whether the hard mask is in force."""

    def expected_retention(self) -> float:
        """Return r-hat."""


def gate_parameter_groups(gate: ScheduledGate) -> Iterator[tuple[torch.nn.Parameter, str]]:
    """Yield log_alpha, and the Lagrangian's lambdas where there are any."""
    yield gate.log_alpha, MASK_GROUP
    if not gate.controller.uses_budget:
        yield gate.controller.lambdas, LAMBDA_GROUP


def gate_metrics(gates: Sequence[ScheduledGate]) -> Metrics:
    """Return r, r-hat and the lambdas of the gates of a model chunk."""
    metrics: Metrics = {}
    for gate in gates:
        layer = str(gate.layer)
        metrics["retention_target"] = gate.step.retention
        metrics["frozen"] = gate.is_frozen
        metrics.setdefault("retention", {})[layer] = gate.expected_retention()
        if not gate.controller.uses_budget:
            lambda_1, lambda_2 = gate.controller.lambdas.tolist()
            metrics.setdefault("lambda1", {})[layer] = lambda_1
            metrics.setdefault("lambda2", {})[layer] = lambda_2
    return metrics

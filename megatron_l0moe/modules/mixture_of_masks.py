"""Mixture-of-Masks: E masks over the channels of one shared FFN, and which of them a token uses.

Our reading of an abstract (Liu et al., ACL 2025 long 768), see docs/methods.md: a token takes the k masks that its
router scores highest, with weights p_e, and its FFN is y = W_down(sum_e p_e z_e * a), a = silu(W_gate x) * W_up x.
A unit is active for a token where at least one of the token's masks keeps it. The weights are those of the dense MLP
under the dense MLP's names; all masks share them. In training all channels are computed.

The equations come first, in plain torch; then the hard concrete masks of a layer, which are held to the scheduled
activated fraction; then Megatron's MLP with both. `log_alpha` lives as [E, F/p] on each rank, channel j of rank r being
global channel r * F/p + j. All mask arithmetic is float32, also in bf16 models.

Shapes: s = sequence (local under sequence parallelism), S = the sequence that the tensor-parallel ranks hold together,
b = micro-batch, h = hidden, F = FFN channels (in the equations also a rank's part of them), E = masks, k = masks of a
token, C = sets of k masks, E choose k, p = TP size. Leading dimensions `...` are tokens in any arrangement.
"""

import functools
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.modules import hard_concrete
from megatron_l0moe.modules.hard_concrete import (
    Float32State,
    HardConcreteConfig,
    gate_metrics,
    gate_parameter_groups,
)
from megatron_l0moe.modules.l0_mlp import AttachPenalty, ScaledMLP
from megatron_l0moe.modules.retention import GateStep, Phase, RetentionConfig, RetentionController
from megatron_l0moe.modules.router import ExpertLoad, balance_loss
from megatron_l0moe.modules.tensor_parallel import gather_shards, mean_over_shards
from megatron_l0moe.modules.token_gate import TokenGate
from megatron_l0moe.modules.trained_part import Metrics, Schedule, TrainedPart, choice_margins

logger = logging.getLogger(__name__)

MOST_SETS = 512  # [C, k, F] is held for a layer: 32 masks by two are 496 sets


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Masks and router of Mixture-of-Masks; the abstract gives the target and nothing else."""

    l0_masks: int = 8
    """E: masks over the channels of each shared FFN."""
    l0_masks_top_k: int = 2
    """k: masks that a token uses, from 2 on: the softmax over one alone is 1, and no router learns from that."""
    l0_masks_target: float = 0.5
    """r at the end: fraction of a layer's FFN channels that a token uses, mean over tokens, in (0, 1)."""
    l0_masks_balance_coeff: float = 0.01
    """Weight of the balance loss of the mask routers."""
    l0_masks_init_std: float = 0.02
    """Standard deviation of the mask routers' random start."""
    l0_masks_seed: int = 1234
    """Seed of that start, which is keyed by seed and layer and by nothing else."""

    def __post_init__(self) -> None:
        if not 2 <= self.l0_masks_top_k < self.l0_masks:
            raise ValueError(
                f"l0_masks_top_k must be at least 2 and below l0_masks ({self.l0_masks}), got {self.l0_masks_top_k}"
            )
        sets = math.comb(self.l0_masks, self.l0_masks_top_k)
        if sets > MOST_SETS:
            raise ValueError(
                f"l0_masks ({self.l0_masks}) by l0_masks_top_k ({self.l0_masks_top_k}) make {sets} sets of masks, "
                f"which must be at most {MOST_SETS}; use fewer masks"
            )
        if not 0 < self.l0_masks_target < 1:
            raise ValueError(f"l0_masks_target must be above 0 and below 1, got {self.l0_masks_target}")
        if self.l0_masks_balance_coeff < 0:
            raise ValueError(f"l0_masks_balance_coeff must be at least 0, got {self.l0_masks_balance_coeff}")
        if self.l0_masks_init_std <= 0:
            raise ValueError(
                f"l0_masks_init_std must be above 0, or no mask is ever chosen for a reason, got "
                f"{self.l0_masks_init_std}"
            )


def choose_masks(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return each token's weights, the softmax over its k highest logits, and the masks that these are of.

    Args:
        logits: [..., E].
        k: masks of a token.

    Returns:
        Weights [..., E], 0 for masks that are not chosen, and the chosen masks [..., k], ascending.
    """
    highest, chosen = logits.topk(k, dim=-1)
    weights = torch.zeros_like(logits).scatter(-1, chosen, torch.softmax(highest, dim=-1))
    return weights, chosen.sort(dim=-1).values


def channel_factors(weights: Tensor, z: Tensor) -> Tensor:
    """Return what each token's channels are multiplied by, sum_e p_e z_e; weights [..., E], z [E, F] -> [..., F].

    A channel that every mask holds open has the factor 1 and not a rounded sum of weights, so that with all masks open
    the layer is the dense one, bit for bit. Its gradients lack nothing: the weights sum to 1 whatever the router says,
    and z is cut off at 1.
    """
    is_shared = (z == 1).all(dim=0)
    return torch.where(is_shared, 1.0, weights @ z)


def mask_sets(masks: int, k: int) -> Tensor:
    """Return all sets of k masks, int64 [C, k], each ascending, in the order that `set_index` counts them."""
    sets = sorted(itertools.combinations(range(masks), k), key=lambda members: members[::-1])
    return torch.tensor(sets)


def set_places(masks: int, k: int) -> Tensor:
    """Return what the j-th mask of an ascending set adds to the set's row, (mask choose j), j from 1; int64 [E, k]."""
    return torch.tensor([[math.comb(mask, j) for j in range(1, k + 1)] for mask in range(masks)])


def set_index(chosen: Tensor, places: Tensor) -> Tensor:
    """Return the row of `mask_sets` that each token's masks are, by the combinatorial number system.

    Args:
        chosen: [..., k], ascending.
        places: `set_places`, [E, k], on the same device.

    Returns:
        int64 [...].
    """
    return places[chosen, torch.arange(chosen.shape[-1], device=chosen.device)].sum(dim=-1)


def activated(open_probability: Tensor, sets: Tensor, load: Tensor) -> Tensor:
    """Return the probability that a token uses each channel: of a mask of its set being open there.

    The noise of masks is independent, so a set's probability is 1 - prod (1 - P). Sets count by how many tokens choose
    them.

    Args:
        open_probability: [E, F], P(z != 0); or masks of 0 and 1.
        sets: [C, k].
        load: [C], fraction of the tokens that choose a set.

    Returns:
        [F]; its mean over all channels is the expected activated fraction r-hat.
    """
    closed = (1 - open_probability[sets]).unbind(dim=1)  # shape: (C, k, F) -> k of (C, F)
    of_sets = 1 - functools.reduce(torch.mul, closed)  # the gradient of prod() would wait for the device
    return load.to(of_sets.dtype) @ of_sets


def hard_masks(log_alpha: Tensor, sets: Tensor, load: Tensor, target: float) -> Tensor:
    """Return masks of 0 and 1 whose activated fraction is the largest one that does not exceed the target.

    The entries with the highest log_alpha are open, across all masks of the layer: a mask is as wide as it has
    learned to be. Equal scores go to the lower channel, then to the lower mask, so that no mask is filled before
    another where many lie at log_alpha's upper clamp; one entry at least is open.

    Args:
        log_alpha: [E, F], all channels of a layer.
        sets: [C, k].
        load: [C], fraction of the tokens that choose a set.
        target: activated fraction.

    Returns:
        float32 [E, F].
    """
    order = torch.sort(log_alpha.T.flatten(), descending=True, stable=True).indices
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device)
    rank = rank.view(log_alpha.T.shape).T

    def fraction(count: int) -> float:
        return float(activated((rank < count).double(), sets, load).mean())

    few, many = 1, order.numel() + 1  # the fraction grows with the count; `many` is taken as too many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if fraction(middle) <= target + 1e-9 else (few, middle)
    return (rank < few).float()


class MaskGate(Float32State, TrainedPart):
    """E masks, their Lagrangian, and how many tokens choose which set of masks.

    The counterpart of `HardConcreteGate`, with the same schedule: open, sampled, frozen to 0 and 1. Its r-hat is the
    activated fraction, which depends on what tokens choose; it takes the choices of the last global batch, as the
    balance loss does, so that it is the same in every layout and for every micro-batch size.

    Args:
        config: Megatron's transformer config.
        mask_config: masks and their target.
        gate_config: distribution of each mask's gates (eq. 1 of L0-MoE).
        retention_config: the schedule.
        layer: global index of the layer, from 0.
        local_width: F/p.
        pg_collection: `tp` shards F; tokens are counted over `tp_dp_cp`, or over `dp_cp` where TP ranks hold the same.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        mask_config: MaskConfig,
        gate_config: HardConcreteConfig,
        retention_config: RetentionConfig,
        layer: int,
        local_width: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.mask_config = mask_config
        self.gate_config = gate_config
        self.layer = layer
        self.tp_group = pg_collection.tp
        self.local_width = local_width
        self.width = local_width * self.tp_group.size()
        masks, k = mask_config.l0_masks, mask_config.l0_masks_top_k
        device = torch.cuda.current_device()
        self.log_alpha = torch.nn.Parameter(
            torch.full((masks, local_width), gate_config.l0_log_alpha_init, device=device)
        )
        for name, value in (("tensor_model_parallel", True), ("partition_dim", 1), ("partition_stride", 1)):
            setattr(self.log_alpha, name, value)
        self.controller = RetentionController(
            config, retention_config, mask_config.l0_masks_target, self.tp_group
        )
        tokens = pg_collection.tp_dp_cp if config.sequence_parallel else pg_collection.dp_cp
        self.set_load = ExpertLoad(config, math.comb(masks, k), tokens)
        self.is_first = self.tp_group.rank() == tokens.rank() == 0  # of the ranks that hold this layer
        # on the device once, since a copy in every forward pass would wait for it
        self.sets, self.places = mask_sets(masks, k).to(device), set_places(masks, k).to(device)
        self.register_buffer("hard_mask", torch.ones(masks, local_width, device=device))
        self.register_buffer("frozen", torch.zeros(1, dtype=torch.int64, device=device))
        self.step = GateStep(iteration=0, phase=Phase.LEARN, retention=1.0, penalty_scale=1.0)

    def begin_step(self, schedule: Schedule) -> None:
        """Take the place in the schedule that the final activated fraction gives it."""
        self.begin_iteration(schedule(self.controller.target))

    def parameter_groups(self) -> Iterator[tuple[torch.nn.Parameter, str]]:
        """Yield log_alpha, and the Lagrangian's lambdas."""
        return gate_parameter_groups(self)

    @classmethod
    def metrics(cls, parts: Sequence[Self]) -> Metrics:
        """Return r, the activated fraction and the lambdas by layer, and the load of each mask."""
        load = {str(gate.layer): gate.mask_load.tolist() for gate in parts}
        return {**gate_metrics(parts), "load": load}

    @torch.no_grad()
    def begin_iteration(self, step: GateStep) -> None:
        """Set the schedule's position; bound log_alpha; freeze the masks when their time comes.

        Raises:
            L0MoEError: NaN in log_alpha when the masks freeze, which a loss of this step would no longer show.
        """
        self.step = step
        self.set_load.begin_iteration()
        self.log_alpha.clamp_(self.gate_config.l0_log_alpha_min, self.gate_config.l0_log_alpha_max)
        if step.phase is Phase.FROZEN and not self.frozen.item():
            self._freeze()

    @property
    def is_frozen(self) -> bool:
        """Whether the hard masks are in force; outside training the buffer says so."""
        return self.step.phase is Phase.FROZEN or (not self.training and bool(self.frozen.item()))

    @property
    def is_open(self) -> bool:
        """Whether this step's masks are all 1."""
        return self.step.phase is Phase.OPEN

    @property
    def mask_load(self) -> Tensor:
        """Fraction of the routed tokens that each mask took in the last global batch; [E], sums to 1."""
        k = self.sets.shape[1]
        load = torch.zeros(self.mask_config.l0_masks, device=self.sets.device)
        return load.index_add(0, self.sets.flatten(), self.set_load.load.repeat_interleave(k) / k)

    def forward(self) -> Tensor:
        """Return the masks z of this step; [E, F/p], float32."""
        if self.is_frozen:
            mask: Tensor = self.hard_mask
            return mask
        if self.is_open:
            return torch.ones_like(self.hard_mask)
        if not self.training:
            return hard_concrete.deterministic_gate(self.log_alpha, self.gate_config)
        u = hard_concrete.gate_noise(
            seed=self.gate_config.l0_noise_seed,
            iteration=self.step.iteration,
            layer=self.layer,
            size=self.mask_config.l0_masks * self.width,
            device=self.log_alpha.device,
        )
        return hard_concrete.sample_gate(
            self.log_alpha, self._shard(u.view(-1, self.width)), self.gate_config
        )

    def penalty(self, z: Tensor) -> Tensor | None:
        """Return eq. 2 for this layer, or None where the step has no penalty; scalar float32."""
        if self.step.phase is not Phase.LEARN:
            return None
        return self.controller.penalty(
            self._activated(self._open_probability()), self._activated(z), self.step.retention
        )

    def count(self, chosen: Tensor) -> None:
        """Count the tokens that chose each set of masks; [..., k], ascending."""
        index = set_index(chosen, self.places).flatten()
        self.set_load.add(index[:, None] == torch.arange(len(self.sets), device=index.device))

    @torch.no_grad()
    def expected_retention(self) -> float:
        """Return r-hat as it is logged: the expected activated fraction, or the hard masks' once frozen."""
        kept = self.hard_mask if self.is_frozen else self._open_probability()
        return float(mean_over_shards(self._activated(kept), self.tp_group))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        """Shard log_alpha and hard_mask over F like fc2's input; the rest is replicated."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"log_alpha": 1, "hard_mask": 1},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )

    def _freeze(self) -> None:
        full = gather_shards(self.log_alpha.T.contiguous(), self.tp_group).T
        if full.isnan().any():
            raise L0MoEError(
                f"log_alpha of layer {self.layer} holds NaN in iteration {self.step.iteration}, in which its masks "
                "freeze; go on from an earlier checkpoint with a lower --l0-mask-lr."
            )
        masks = hard_masks(full, self.sets, self.set_load.load, self.mask_config.l0_masks_target)
        is_empty = ~masks.bool().any(dim=1)
        if self.is_first and is_empty.any():
            logger.warning(
                "Masks %s of layer %d keep no channel: a token that chooses no other mask skips the layer's FFN.",
                is_empty.nonzero().flatten().tolist(),
                self.layer,
            )
        self.hard_mask.copy_(self._shard(masks))
        self.frozen.fill_(1)

    def _open_probability(self) -> Tensor:
        return hard_concrete.open_probability(self.log_alpha, self.gate_config)

    def _activated(self, open_probability: Tensor) -> Tensor:
        return activated(open_probability, self.sets, self.set_load.load)

    def _shard(self, full: Tensor) -> Tensor:
        rank = self.tp_group.rank()
        return full[:, rank * self.local_width : (rank + 1) * self.local_width]


class MaskRouter(TokenGate):
    """The router of one layer: weight [E, h]; its sums are the balance loss, and micro-batches."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        mask_config: MaskConfig,
        layer: int,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__(
            config,
            layer=layer,
            parts=mask_config.l0_masks,
            std=mask_config.l0_masks_init_std,
            seed=mask_config.l0_masks_seed,
            counts=2,
            tp_group=tp_group,
        )
        self.mask_config = mask_config

    def forward(self, hidden_states: Tensor, mask_load: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the masks' weights for all tokens of the tensor-parallel group, this rank's choices, and the loss.

        Args:
            hidden_states: [s, b, h], the normalised input of the MLP.
            mask_load: [E], of the last global batch.

        Returns:
            Weights [S, b, E] float32, chosen masks [s, b, k], and the scalar of `hand_out`.
        """
        logits = self.logits(hidden_states)
        weights, chosen = choose_masks(logits, self.mask_config.l0_masks_top_k)
        probability = torch.softmax(logits, dim=-1).flatten(0, -2).mean(dim=0)
        loss = balance_loss(mask_load, probability)
        if self.is_counting:
            seen = loss.detach().double()
            self.count(torch.stack([seen, torch.ones_like(seen)]))
        weights, loss = self.hand_out(weights, loss * self.mask_config.l0_masks_balance_coeff)
        return weights, chosen, loss

    @classmethod
    def metrics(cls, parts: Sequence[Self]) -> Metrics:
        """Return the balance loss by layer, the mean over the global batch."""
        means = [loss / max(micro_batches, 1.0) for loss, micro_batches in cls.summed_counts(parts)]
        return {"balance_loss": dict(zip([str(router.layer) for router in parts], means, strict=True))}

    def margins(self, hidden_states: Tensor) -> Tensor | None:
        """Return how far each token is from choosing other masks, [s * b], relative."""
        logits = torch.nn.functional.linear(hidden_states.float(), self.weight.float()).flatten(0, -2)
        return choice_margins(logits, self.mask_config.l0_masks_top_k)


class MoMMLP(ScaledMLP):
    """MLP whose intermediate activation [S, b, F/p] is multiplied by the token's mixture of masks just before fc2."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        *,
        pg_collection: ProcessGroupCollection,
        mask_config: MaskConfig,
        gate_config: HardConcreteConfig,
        retention_config: RetentionConfig,
        layer: int,
        name: str | None = None,
    ) -> None:
        super().__init__(config, submodules, pg_collection=pg_collection, name=name)
        self.masks = MaskGate(
            config,
            mask_config=mask_config,
            gate_config=gate_config,
            retention_config=retention_config,
            layer=layer,
            local_width=config.ffn_hidden_size // pg_collection.tp.size(),
            pg_collection=pg_collection,
        )
        self.mask_router = MaskRouter(config, mask_config=mask_config, layer=layer, tp_group=pg_collection.tp)
        self._weights: Tensor | None = None
        self._z: Tensor | None = None

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] -> [s, b, h] and the bias, as in Megatron's MLP."""
        learns = self.training and torch.is_grad_enabled()
        self._weights, chosen, loss = self.mask_router(hidden_states, self.masks.mask_load)
        self._z = self.masks()
        output, bias = super().forward(hidden_states, per_token_scale, **kwargs)
        penalty = self.masks.penalty(self._z) if learns else None
        self._weights = self._z = None
        if learns:
            self.masks.count(chosen)
            if self.mask_router.mask_config.l0_masks_balance_coeff:
                output = MoEAuxLossAutoScaler.apply(output, loss)
        if penalty is not None:
            output = AttachPenalty.apply(output, penalty, self.masks.step.penalty_scale)
        return output, bias

    def scale(self, activation: Tensor) -> Tensor:
        """[S, b, F/p] times each token's factors of the channels."""
        assert self._weights is not None, "fc2 of a MoMMLP ran outside its forward"
        assert self._z is not None
        if self.masks.is_open:
            return activation
        return activation * channel_factors(self._weights, self._z).to(activation.dtype)

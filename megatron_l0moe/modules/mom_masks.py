"""The hard concrete masks of one layer of a Mixture-of-Masks, held to the scheduled activated fraction.

Shapes: E = masks, F = FFN channels of the layer (global), p = tensor-parallel size, C = sets of k masks, k = masks of a
token. `log_alpha` lives as [E, F/p] on each rank, channel j of rank r being global channel r * F/p + j. All mask
arithmetic is float32, also in bf16 models.
"""

import logging
import math
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.modules import hard_concrete
from megatron_l0moe.modules.collectives import gather_shards, mean_over_shards
from megatron_l0moe.modules.hard_concrete import Float32State, HardConcreteConfig
from megatron_l0moe.modules.mask_gate import (
    MaskConfig,
    activated,
    hard_masks,
    mask_sets,
    set_index,
    set_places,
)
from megatron_l0moe.modules.retention import GateStep, Phase, RetentionConfig, RetentionController
from megatron_l0moe.modules.router import ExpertLoad

logger = logging.getLogger(__name__)


class MaskGate(Float32State):
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

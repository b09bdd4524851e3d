"""Megatron's gated MLP as a Mixture-of-Masks: a token's channels are weighted by the masks that its router chooses.

The weights are those of the dense MLP under the dense MLP's names; all masks share them. `mask_gate.py` has the
equations. In training all channels are computed.

Shapes: s = sequence (local under sequence parallelism), S = the sequence that the tensor-parallel ranks hold together,
b = micro-batch, h = hidden, F = FFN channels, E = masks, k = masks of a token, p = TP size.
"""

from typing import Any

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, router_gating_linear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_l0moe.modules.collectives import copy_to_shards
from megatron_l0moe.modules.hard_concrete import HardConcreteConfig
from megatron_l0moe.modules.l0_mlp import AttachPenalty
from megatron_l0moe.modules.mask_gate import MaskConfig, channel_factors, choose_masks
from megatron_l0moe.modules.mom_masks import MaskGate
from megatron_l0moe.modules.retention import RetentionConfig
from megatron_l0moe.modules.router import balance_loss


class MaskRouter(MegatronModule):
    """The router of one layer: weight [E, h], the same on all tensor-parallel ranks; logits in float32."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        mask_config: MaskConfig,
        layer: int,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__(config)
        self.mask_config = mask_config
        self.layer = layer
        self.tp_group = tp_group
        self.is_sequence_sharded = bool(config.sequence_parallel) and tp_group.size() > 1
        start = initial_weight(mask_config, layer=layer, hidden=config.hidden_size)
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(start.to(device=device, dtype=config.params_dtype))
        # each rank sees its own part of the sequence: Megatron sums the gradients of so marked weights over the ranks
        setattr(self.weight, "sequence_parallel", self.is_sequence_sharded)  # noqa: B010  # Megatron reads this name
        self.begin_iteration()

    def begin_iteration(self) -> None:
        """Start the sums of a global batch: balance loss, and micro-batches of this rank; float64 [2]."""
        self.sums = torch.zeros(2, dtype=torch.float64)

    def forward(self, hidden_states: Tensor, mask_load: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the masks' weights for all tokens of the tensor-parallel group, this rank's choices, and the loss.

        Args:
            hidden_states: [s, b, h], the normalised input of the MLP.
            mask_load: [E], of the last global batch.

        Returns:
            Weights [S, b, E] float32, chosen masks [s, b, k], and a scalar whose gradient, summed over the ranks where
            the sequence is cut, is that of the micro-batch's balance loss times its coefficient.
        """
        logits = router_gating_linear(hidden_states, self.weight, None, torch.float32)
        weights, chosen = choose_masks(logits, self.mask_config.l0_masks_top_k)
        probability = torch.softmax(logits, dim=-1).flatten(0, -2).mean(dim=0)
        loss = balance_loss(mask_load, probability)
        if self.training and torch.is_grad_enabled():  # under recomputation a layer runs twice: count once
            seen = loss.detach().double()
            self.sums = self.sums.to(seen.device) + torch.stack([seen, torch.ones_like(seen)])
        coefficient = self.mask_config.l0_masks_balance_coeff
        if self.is_sequence_sharded:
            weights = gather_from_sequence_parallel_region(weights, group=self.tp_group)
            return weights, chosen, loss * (coefficient / self.tp_group.size())
        return copy_to_shards(weights, self.tp_group), chosen, loss * coefficient


class MoMMLP(MLP):
    """MLP whose intermediate activation [S, b, F/p] is multiplied by the token's mixture of masks just before fc2.

    The place is that of `L0MLP`: fc2 is linear, and gate and up share the factor because it acts on their product.
    """

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
        super().__init__(
            config,
            submodules,
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=pg_collection.tp,
            name=name,
        )
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
        self.linear_fc2.register_forward_pre_hook(self._apply_masks)

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

    def _apply_masks(self, module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert self._weights is not None, "fc2 of a MoMMLP ran outside its forward"
        assert self._z is not None
        if self.masks.is_open:
            return args
        return (args[0] * channel_factors(self._weights, self._z).to(args[0].dtype), *args[1:])

    @classmethod
    def as_mlp_submodule(
        cls,
        submodules: MLPSubmodules,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        is_mtp_layer: bool,
        *,
        mask_config: MaskConfig,
        gate_config: HardConcreteConfig,
        retention_config: RetentionConfig,
        layer: int,
        name: str | None = None,
    ) -> "MoMMLP":
        """Build the MLP of a TransformerLayer; the signature that core/transformer/transformer_layer.py:433 calls."""
        del is_mtp_layer
        return cls(
            config,
            submodules,
            pg_collection=pg_collection,
            mask_config=mask_config,
            gate_config=gate_config,
            retention_config=retention_config,
            layer=layer,
            name=name,
        )


def initial_weight(config: MaskConfig, *, layer: int, hidden: int) -> Tensor:
    """Return the router's random start, the same in every layout; float32 [E, h]."""
    key = np.random.SeedSequence([config.l0_masks_seed, layer]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(key) & (2**63 - 1))
    return config.l0_masks_init_std * torch.randn(config.l0_masks, hidden, generator=generator)

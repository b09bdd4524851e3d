"""Megatron's gated MLP as a Mixture-of-Masks: a token's channels are weighted by the masks that its router chooses.

The weights are those of the dense MLP under the dense MLP's names; all masks share them. `mask_gate.py` has the
equations. In training all channels are computed.

Shapes: s = sequence (local under sequence parallelism), S = the sequence that the tensor-parallel ranks hold together,
b = micro-batch, h = hidden, F = FFN channels, E = masks, k = masks of a token, p = TP size.
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_l0moe.modules.hard_concrete import HardConcreteConfig
from megatron_l0moe.modules.mask_gate import MaskConfig, channel_factors, choose_masks
from megatron_l0moe.modules.mom_masks import MaskGate
from megatron_l0moe.modules.retention import RetentionConfig
from megatron_l0moe.modules.router import balance_loss
from megatron_l0moe.modules.scaled_mlp import AttachPenalty, ScaledMLP
from megatron_l0moe.modules.token_gate import TokenGate


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

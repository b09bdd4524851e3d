"""Megatron's MLP with a hard concrete gate between the activation and fc2 (paper section 3.2).

Shapes: s = sequence (local under sequence parallelism), b = micro-batch, h = hidden, F = FFN channels, p = TP size.
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_l0moe.modules.hard_concrete import HardConcreteConfig, HardConcreteGate
from megatron_l0moe.modules.retention import RetentionConfig
from megatron_l0moe.modules.scaled_mlp import AttachPenalty, ScaledMLP


class _ApplyGate(torch.autograd.Function):
    """activation [..., F/p] * z [F/p], keeping the product for the backward pass and not the activation.

    fc2 keeps the product anyway, so that a learning gate takes no memory of the activation's size. The activation is
    product / z; where z is 0 it cannot be told, nor need it be: there the clip of eq. 1 lets no gradient through.
    """

    @staticmethod
    def forward(ctx: Any, activation: Tensor, z: Tensor) -> Tensor:
        product = activation * z
        ctx.save_for_backward(product, z)
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        (gradient,) = gradients
        product, z = ctx.saved_tensors
        z_gradient = None
        if ctx.needs_input_grad[1]:
            total = (gradient * product).sum(dim=tuple(range(gradient.dim() - 1)))
            z_gradient = torch.where(z > 0, total / z, torch.zeros_like(total))
        return gradient * z, z_gradient


class L0MLP(ScaledMLP):
    """MLP whose intermediate activation [s, b, F/p] is multiplied by the gate z [F/p] just before fc2."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        *,
        pg_collection: ProcessGroupCollection,
        gate_config: HardConcreteConfig,
        retention_config: RetentionConfig,
        layer: int,
        name: str | None = None,
    ) -> None:
        super().__init__(config, submodules, pg_collection=pg_collection, name=name)
        self.gate = HardConcreteGate(
            config,
            gate_config=gate_config,
            retention_config=retention_config,
            layer=layer,
            local_width=config.ffn_hidden_size // pg_collection.tp.size(),
            tp_group=pg_collection.tp,
            dp_cp_group=pg_collection.dp_cp,
        )
        self._z: Tensor | None = None

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] -> [s, b, h] and the bias, as in Megatron's MLP."""
        self.gate.observe_input(hidden_states)
        self._z = self.gate()
        output, bias = super().forward(hidden_states, per_token_scale, **kwargs)
        penalty = self.gate.penalty(self._z) if self.training and torch.is_grad_enabled() else None
        self._z = None
        if penalty is not None:
            output = AttachPenalty.apply(output, penalty, self.gate.step.penalty_scale)
        return output, bias

    def scale(self, activation: Tensor) -> Tensor:
        """[s, b, F/p] times z."""
        assert self._z is not None, "fc2 of an L0MLP ran outside its forward"
        z = self._z.to(activation.dtype)
        gated: Tensor = _ApplyGate.apply(activation, z) if z.requires_grad else activation * z
        return gated

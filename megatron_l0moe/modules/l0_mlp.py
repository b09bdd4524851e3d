"""Megatron's gated MLP with factors on its intermediate activation, just before fc2; here a hard concrete gate (3.2).

fc2 is linear, so a factor may stand before it, and gate and up share the factor because it acts on their product.
MLP.forward is monolithic, so the place is a forward pre-hook of `linear_fc2`.

Shapes: s = sequence (local under sequence parallelism), b = micro-batch, h = hidden, F = FFN channels, p = TP size.
"""

from typing import Any, Self

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_l0moe.modules.hard_concrete import HardConcreteConfig, HardConcreteGate
from megatron_l0moe.modules.retention import RetentionConfig


class ScaledMLP(MLP):
    """A dense MLP of the model's own FFN width; a subclass says in `scale` what its activation is multiplied by."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        *,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__(
            config,
            submodules,
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=pg_collection.tp,
            name=name,
        )
        self.linear_fc2.register_forward_pre_hook(self._before_fc2)

    def scale(self, activation: Tensor) -> Tensor:
        """Return what fc2 sees: [S, b, F/p] -> [S, b, F/p], with S the sequence that the TP ranks hold together."""
        raise NotImplementedError

    @classmethod
    def as_mlp_submodule(
        cls,
        submodules: MLPSubmodules,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        is_mtp_layer: bool,
        **settings: Any,
    ) -> Self:
        """Build the MLP of a TransformerLayer; the signature that core/transformer/transformer_layer.py:433 calls."""
        del is_mtp_layer
        return cls(config, submodules, pg_collection=pg_collection, **settings)

    def _before_fc2(self, module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.scale(args[0]), *args[1:])


class AttachPenalty(torch.autograd.Function):
    """Pass ``output`` through and give ``penalty`` the gradient ``scale``.

    The penalty depends on parameters only, so it is added once for each micro-batch on the rank that owns the layer,
    without travelling through the pipeline to the loss.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, penalty: Tensor, scale: float) -> Tensor:
        """Return `output`; `scale` is that of the penalty's gradient."""
        ctx.scale = scale
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of output and penalty."""
        (gradient,) = gradients
        return gradient, torch.full((), ctx.scale, dtype=torch.float32, device=gradient.device), None


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

"""Megatron's gated MLP with a place for factors on its intermediate activation, just before fc2.

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

"""RMSNorm for Megatron's local spec that accepts sequence parallelism."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with Megatron's constructor, its weight marked for the sequence-parallel gradient sum.

    Megatron's WrappedTorchNorm refuses sequence parallelism (core/transformer/torch_norm.py:50), which every MoE
    with tensor parallelism needs.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010  # Megatron reads this name

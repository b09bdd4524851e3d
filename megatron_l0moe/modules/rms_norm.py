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


class SeparateRMSNorm(RMSNorm):
    """An RMSNorm in a place where Transformer Engine, too, has a norm of its own, not one inside a linear layer.

    Its checkpoint holds an empty `_extra_state`, as those of linear layers do: Transformer Engine's norm asks
    for one, so that without it a run that began on a CPU could not go on on a GPU.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(config, hidden_size, eps, **kwargs)
        # as in core/tensor_parallel/layers.py:1087: a checkpoint may lack it
        self._register_load_state_dict_pre_hook(
            lambda state_dict, prefix, *args, **kwargs: state_dict.setdefault(f"{prefix}_extra_state")
        )

    def get_extra_state(self) -> None:
        """Return nothing."""
        return

    def set_extra_state(self, state: Any) -> None:
        """Take nothing."""

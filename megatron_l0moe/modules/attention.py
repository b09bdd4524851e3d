"""Causal attention for Megatron's local spec.

Shapes: s = sequence, b = micro-batch, n = heads of this rank, g = key/value groups of this rank, d = head width.
"""

import math
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_l0moe.runtime.attention import causal_attention


class LocalAttention(MegatronModule):
    """Megatron's `core_attention` on the fastest kernel of this device.

    Megatron's own local attention (core/transformer/dot_product_attention.py) copies and fills the scores several
    times, which takes a quarter of a training step on a CPU. Dropout and attention masks other than causal are not
    used in our stages and are refused.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout != 0 or attn_mask_type is not AttnMaskType.causal or config.context_parallel_size != 1:
            raise ValueError(
                f"The local attention is causal, without dropout and context parallelism, got dropout {dropout}, mask "
                f"{attn_mask_type}, context_parallel_size {config.context_parallel_size}; use Transformer Engine"
            )
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """[s, b, n, d], [s, b, g, d], [s, b, g, d] -> [s, b, n * d]."""
        assert attention_bias is None and packed_seq_params is None, "not part of any stage"  # noqa: PT018
        repeats = query.shape[2] // key.shape[2]
        if repeats > 1:
            key, value = (tensor.repeat_interleave(repeats, dim=2) for tensor in (key, value))
        # shape: (s, b, n, d) -> (b, n, s, d)
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        context = causal_attention(q, k, v, self.softmax_scale)
        # shape: (b, n, s, d) -> (s, b, n * d)
        return context.permute(2, 0, 1, 3).flatten(start_dim=2)

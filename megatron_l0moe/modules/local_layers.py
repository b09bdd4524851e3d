"""What stands in for Transformer Engine's layers in Megatron's local spec: attention, RMSNorm, experts.

Attention is causal, by the kernel that is fastest on the device; the norm accepts sequence parallelism; the experts see
row counts that a CPU's kernels know already.

Shapes: s = sequence, b = micro-batch, n = heads of this rank, g = key/value groups of this rank, d = head width,
T = routed tokens of the local experts, sorted by expert, h = hidden.
"""

import math
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_l0moe.runtime.cpu import has_cuda
from megatron_l0moe.runtime.platform import expert_row_multiple


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T + causal mask) v, [b, n, s, d] each -> [b, n, s, d].

    On a GPU torch's fused kernel. On a CPU its backward pass in bf16 takes twice the time of the plain products
    (37 against 24 ms for forward and backward at b = 2, n = 9, s = 512, d = 64 on two cores).
    """
    if has_cuda():
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale
        )
    b, n, s, d = query.shape
    q, k, v = (tensor.reshape(b * n, s, d) for tensor in (query, key, value))
    mask = torch.full((s, s), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    scores = torch.baddbmm(mask.expand(b * n, s, s), q, k.transpose(1, 2), alpha=scale)
    return torch.bmm(torch.softmax(scores, dim=-1), v).view(b, n, s, d)


class PaddedExperts(SequentialMLP):
    """SequentialMLP whose experts each see a multiple of `expert_row_multiple(dtype)` rows, filled up with zeros.

    A zero row gives a zero output and no gradient, so the numbers are those of SequentialMLP. Transformer Engine's
    grouped experts take the place of this class where it can be imported.
    """

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """[T, h], [local experts], [T] -> [T, h] and the bias, as in SequentialMLP."""
        counts = tokens_per_expert.tolist()
        multiple = expert_row_multiple(permuted_local_hidden_states.dtype)
        padded = [-(-count // multiple) * multiple for count in counts]
        if padded == counts:
            unpadded: tuple[Tensor, Tensor | None] = super().forward(
                permuted_local_hidden_states, tokens_per_expert, permuted_probs
            )
            return unpadded
        rows = _rows(counts, padded).to(permuted_local_hidden_states.device)
        hidden = permuted_local_hidden_states.new_zeros((sum(padded), permuted_local_hidden_states.shape[1]))
        probs = permuted_probs.new_zeros(sum(padded))
        output, bias = super().forward(
            hidden.index_copy(0, rows, permuted_local_hidden_states),
            torch.tensor(padded, device=tokens_per_expert.device),
            probs.index_copy(0, rows, permuted_probs),
        )
        return output.index_select(0, rows), bias


def _rows(counts: list[int], padded: list[int]) -> Tensor:
    """Return the row of each token in the padded order; int64 [T]."""
    starts = [sum(padded[:expert]) for expert in range(len(padded))]
    return torch.cat(
        [torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]
    )


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

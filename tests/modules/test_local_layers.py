"""The local attention against loops in float64 and against torch's own, with grouped key/value heads."""

import math

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_l0moe.modules.local_layers import LocalAttention

FLOAT32_ATOL = 2e-6  # sums of 8 float32 products in another order
S, B, HEADS, GROUPS, D = 5, 2, 4, 2, 8


def attention(**changes) -> LocalAttention:
    settings = {"attention_dropout": 0.0, **changes}
    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * D, num_attention_heads=HEADS, num_query_groups=GROUPS
    )
    return LocalAttention(config, 1, AttnMaskType.causal, "self", **settings)


def by_loops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(S, B, HEADS, D, dtype=torch.float64)
    for b in range(B):
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            for i in range(S):
                weights = [
                    math.exp(float(q[i, b, head] @ k[j, b, group]) / math.sqrt(D)) for j in range(i + 1)
                ]
                for j, weight in enumerate(weights):
                    out[i, b, head] += weight / sum(weights) * v[j, b, group]
    return out.reshape(S, B, HEADS * D)


def test_equals_loops_and_sees_no_later_position():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(S, B, HEADS, D, generator=generator)
    k, v = (torch.randn(S, B, GROUPS, D, generator=generator) for _ in range(2))
    result = attention()(q, k, v, None)
    expected = by_loops(q.double(), k.double(), v.double())
    assert torch.allclose(result.double(), expected, atol=FLOAT32_ATOL)
    wrong = by_loops(q.double(), k.flip(2).double(), v.double())  # control: groups exchanged
    assert not torch.allclose(result.double(), wrong, atol=FLOAT32_ATOL)
    v[-1] += 1
    assert torch.equal(attention()(q, k, v, None)[:-1], result[:-1])


def test_gradients_equal_those_of_torchs_kernel():
    q, k, v = (torch.randn(S, B, heads, D, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS))
    ours = torch.autograd.grad(attention()(q, k, v, None).square().sum(), (q, k, v))
    full = [t.repeat_interleave(HEADS // t.shape[2], dim=2).permute(1, 2, 0, 3) for t in (q, k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(*full, is_causal=True)
    expected = torch.autograd.grad(theirs.square().sum(), (q, k, v))
    for one, other in zip(ours, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_dropout_is_refused():
    with pytest.raises(ValueError, match=r"got dropout 0\.1.*use Transformer Engine"):
        attention(attention_dropout=0.1)

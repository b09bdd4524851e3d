"""The kernel of causal attention that is fastest on this device.

Shapes: b = micro-batch, n = heads, s = sequence, d = head width.
"""

import torch
from torch import Tensor

from megatron_l0moe.runtime.cpu import has_cuda


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

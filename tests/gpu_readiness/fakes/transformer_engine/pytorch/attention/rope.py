"""Rotary position embedding.

Shapes: s = sequence, b = micro-batch, n = heads, d = head width.
"""

import torch


def apply_rotary_pos_emb(
    t,
    freqs,
    tensor_format="sbhd",
    start_positions=None,
    interleaved=False,
    fused=False,
    cu_seqlens=None,
    cp_size=1,
    cp_rank=0,
):
    """[s, b, n, d] with freqs [s, 1, 1, d] -> [s, b, n, d]."""
    assert (tensor_format, interleaved, cp_size) == ("sbhd", False, 1)
    first, second = t.chunk(2, dim=-1)
    freqs = freqs[: t.shape[0]]
    return (t * freqs.cos() + torch.cat([-second, first], dim=-1) * freqs.sin()).to(t.dtype)

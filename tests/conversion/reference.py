"""Independent forward pass of a dense Llama-like model and of an L0-MoE: plain loops in float64, half-split RoPE.

It reads tensors under the Hugging Face names of the dense family and knows nothing of Megatron or Ernie.
B = batch, S = sequence, H = hidden, D = head_dim, K = experts, E = units of an expert.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Sizes:
    layers: int
    heads: int
    groups: int
    head_dim: int
    eps: float
    base: float
    llama3_factor: float | None = None


@dataclass(frozen=True)
class MoELayer:
    router: torch.Tensor  # [K, H]
    experts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # K of gate [E, H], up [E, H], down [H, E]
    top_k: int


def forward(
    state: dict[str, torch.Tensor],
    sizes: Sizes,
    ids: torch.Tensor,
    moe: dict[int, MoELayer] | None = None,
) -> torch.Tensor:
    """Logits [B, S, V] in float64 for token ids [B, S]."""
    w = {name: tensor.double() for name, tensor in state.items()}
    x = w["model.embed_tokens.weight"][ids]
    for i in range(sizes.layers):
        p = f"model.layers.{i}."
        h = _norm(x, w[p + "input_layernorm.weight"], sizes.eps)
        x = x + _attention(h, w, p + "self_attn.", sizes)
        h = _norm(x, w[p + "post_attention_layernorm.weight"], sizes.eps)
        if moe is not None and i in moe:
            x = x + _moe(h, moe[i])
        else:
            x = x + swiglu(h, *(w[f"{p}mlp.{n}_proj.weight"] for n in ("gate", "up", "down")))
    x = _norm(x, w["model.norm.weight"], sizes.eps)
    return x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def _attention(h: torch.Tensor, w: dict[str, torch.Tensor], p: str, sizes: Sizes) -> torch.Tensor:
    batch, length, _ = h.shape
    out = torch.zeros(batch, length, sizes.heads * sizes.head_dim, dtype=torch.float64)
    q, k, v = (h @ w[f"{p}{n}_proj.weight"].T + w.get(f"{p}{n}_proj.bias", 0) for n in "qkv")
    causal = torch.full((length, length), -math.inf, dtype=torch.float64).triu(1)
    for head in range(sizes.heads):
        group = head // (sizes.heads // sizes.groups)
        rows = slice(head * sizes.head_dim, (head + 1) * sizes.head_dim)
        shared = slice(group * sizes.head_dim, (group + 1) * sizes.head_dim)
        scores = _rotate(q[..., rows], sizes) @ _rotate(k[..., shared], sizes).transpose(1, 2)
        out[..., rows] = (scores / math.sqrt(sizes.head_dim) + causal).softmax(-1) @ v[..., shared]
    return out @ w[f"{p}o_proj.weight"].T


def _rotate(x: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    half = sizes.head_dim // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = torch.arange(x.shape[1], dtype=torch.float64) * _frequency(i, sizes)
        a, b = x[..., i], x[..., i + half]
        out[..., i] = a * angle.cos() - b * angle.sin()
        out[..., i + half] = b * angle.cos() + a * angle.sin()
    return out


def _frequency(i: int, sizes: Sizes) -> float:
    f = sizes.base ** (-2 * i / sizes.head_dim)
    if sizes.llama3_factor is None:
        return f
    wavelength, low, high, original = 2 * math.pi / f, 1.0, 4.0, 8192
    if wavelength < original / high:
        return f
    if wavelength > original / low:
        return f / sizes.llama3_factor
    t = (original / wavelength - low) / (high - low)
    return (1 - t) * f / sizes.llama3_factor + t * f


def _moe(h: torch.Tensor, layer: MoELayer) -> torch.Tensor:
    out = torch.zeros_like(h)
    for b in range(h.shape[0]):
        for s in range(h.shape[1]):
            scores = layer.router.double() @ h[b, s]
            chosen = sorted(range(len(scores)), key=lambda k: -float(scores[k]))[: layer.top_k]
            weights = scores[chosen].softmax(0)  # over the chosen ones only: they sum to 1
            for weight, k in zip(weights, chosen, strict=True):
                out[b, s] += weight * swiglu(h[b, s], *(t.double() for t in layer.experts[k]))
    return out

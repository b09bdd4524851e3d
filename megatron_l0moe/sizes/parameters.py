"""Parameter counts of dense models, of L0-MoEs, and of other methods' exports, from config.json alone (no torch).

Legend: H hidden size, F FFN channels, E expert FFN channels, V vocabulary, K experts, k experts per token,
B sequences decoded together.

What is counted: every trainable weight of the Hugging Face checkpoint; tied embeddings once. Not counted:
constants of the layout such as Ernie4.5-MoE's `moe_statics.e_score_correction_bias`, Qwen2-MoE's `shared_expert_gate`
and biases that the dense family lacks (all zero in our export).
Sizes are taken as if every weight had the same width in bytes (the fp32 routers are too small to matter).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_l0moe.errors import L0MoEError

BASE_FAMILY_KEY = "l0moe_base_family"
"""Key of an exported config.json that names the dense family; inference engines keep it and do not read it."""
DENSE_TYPES = ("llama", "mistral", "qwen2")
MOE_TYPES = ("ernie4_5_moe", "qwen2_moe")


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Number of weights of one causal language model, by what they are."""

    embedding: int
    """The input embedding table [V, H]; with tied embeddings it is the LM head too."""
    lm_head: int
    """Weights that the output projection multiplies, [V, H], tied or not."""
    tied: bool
    attention: int
    norms: int
    dense_ffn: int
    """FFNs that every token passes through."""
    experts: int
    """All K experts of all MoE layers."""
    routers: int
    num_experts: int
    """K; 0 for a dense model."""
    top_k: float
    """k; 0 for a dense model; the mean number of open blocks of a DSMoE."""

    @property
    def total(self) -> int:
        """Weights that are stored, a tied embedding once."""
        head = 0 if self.tied else self.lm_head
        return self.embedding + head + self._shared_body + self.experts

    @property
    def active(self) -> int:
        """Weights that one token is multiplied with: LM head and k of K experts, without the embedding look-up."""
        return round(self.lm_head + self._shared_body + self._one_expert * self.top_k)

    def read(self, batch: int) -> float:
        """Expected weights read by one decode step of `batch` tokens that are routed uniformly and independently."""
        return self.read_with(self.distinct_experts(batch))

    def read_with(self, distinct_experts: float) -> float:
        """Weights read by a pass that uses this many distinct experts in each MoE layer (mean over the layers)."""
        return self.lm_head + self._shared_body + self._one_expert * distinct_experts

    def distinct_experts(self, batch: int) -> float:
        """Expected number of distinct experts that `batch` tokens use in one MoE layer, K (1 - (1 - k/K)^B)."""
        if not self.num_experts:
            return 0.0
        return self.num_experts * (1.0 - (1.0 - self.top_k / self.num_experts) ** batch)

    @property
    def _shared_body(self) -> int:
        return self.attention + self.norms + self.dense_ffn + self.routers

    @property
    def _one_expert(self) -> int:
        """Weights of one expert, in all MoE layers."""
        return self.experts // self.num_experts if self.num_experts else 0


@dataclass(frozen=True, kw_only=True)
class SpeedBounds:
    """Dense time over L0-MoE time if time were proportional to the weights multiplied (or read) per token."""

    prefill: float
    """Ratio of active weights: many tokens, compute bound. Attention scores, equal on both sides, are ignored."""
    decode_b1: float
    """Ratio of active weights = ratio of weights read for one token."""
    decode_b8: float
    """Ratio of weights read for eight tokens, expected number of distinct experts under uniform routing."""


@dataclass(frozen=True, kw_only=True)
class PassBounds:
    """The same for one forward pass over any number of tokens, as `l0moe bench` times them."""

    active: float
    """Ratio of multiplications: what compute alone allows."""
    bytes_read: float
    """Ratio of weights read once, with the expected distinct experts under uniform routing: what memory allows."""


def count_parameters(config: Mapping[str, Any]) -> ParameterCounts:
    """Count the weights of a dense model (Llama, Mistral, Qwen2) or of an L0-MoE (as Ernie4.5-MoE or Qwen2-MoE).

    Raises:
        L0MoEError: the model type is another one, or a size is missing.
    """
    family = config.get("model_type")
    if family not in (*DENSE_TYPES, *MOE_TYPES):
        raise L0MoEError(
            f"config.json has model_type {family!r}; parameters are counted for "
            f"{', '.join((*DENSE_TYPES, *MOE_TYPES))} only."
        )
    hidden, layers, vocab = (_size(config, key) for key in ("hidden_size", "num_hidden_layers", "vocab_size"))
    with_experts = moe_layers(config) if family in MOE_TYPES else 0
    k_key, experts_key = _EXPERT_KEYS.get(str(family), ("", ""))
    experts = _size(config, experts_key) if with_experts else 0
    bias = bool(config.get("use_bias" if family == "ernie4_5_moe" else "mlp_bias", False))
    bias = bias and BASE_FAMILY_KEY not in config
    return ParameterCounts(
        embedding=vocab * hidden,
        lm_head=vocab * hidden,
        tied=bool(config.get("tie_word_embeddings", family == "ernie4_5_moe")),
        attention=layers * _attention(config, hidden),
        norms=(2 * layers + 1) * hidden,
        dense_ffn=(layers - with_experts) * _ffn(hidden, _size(config, "intermediate_size"), bias=bias),
        experts=with_experts * experts * _ffn(hidden, _size(config, "moe_intermediate_size"), bias=False)
        if with_experts
        else 0,
        routers=with_experts * experts * hidden,
        num_experts=experts,
        top_k=_size(config, k_key) if with_experts else 0,
    )


def l0moe_counts(
    dense: Mapping[str, Any], *, dense_layers: int, num_experts: int, expert_ffn: int, top_k: int
) -> ParameterCounts:
    """Count the weights of the L0-MoE that a recipe makes of the dense model whose config.json is `dense`."""
    base = count_parameters(dense)
    hidden, layers = _size(dense, "hidden_size"), _size(dense, "num_hidden_layers")
    if not 0 <= dense_layers < layers:
        raise L0MoEError(
            f"model.dense_layers ({dense_layers}) must be smaller than the model's {layers} layers; "
            f"use at most {layers - 1}."
        )
    moe_layers = layers - dense_layers
    return ParameterCounts(
        embedding=base.embedding,
        lm_head=base.lm_head,
        tied=base.tied,
        attention=base.attention,
        norms=base.norms,
        dense_ffn=base.dense_ffn // layers * dense_layers,
        experts=moe_layers * num_experts * _ffn(hidden, expert_ffn, bias=False),
        routers=moe_layers * num_experts * hidden,
        num_experts=num_experts,
        top_k=top_k,
    )


def speed_bounds(dense: ParameterCounts, moe: ParameterCounts, *, batch: int = 8) -> SpeedBounds:
    """Return the speed-ups that the counts allow (> 1: the L0-MoE is faster); `batch` is that of batched decode."""
    active = dense.active / moe.active
    return SpeedBounds(prefill=active, decode_b1=active, decode_b8=dense.read(batch) / moe.read(batch))


def pass_bounds(
    dense: ParameterCounts,
    moe: ParameterCounts,
    *,
    tokens: int,
    logits: int,
    distinct_experts: float | None = None,
) -> PassBounds:
    """Return the bounds of one pass; attention scores and KV cache, equal on both sides, are ignored.

    Args:
        tokens: that go through the body together: the batch of a decode step, all tokens of a prefill.
        logits: positions whose logits are computed.
        distinct_experts: of one MoE layer, where it was measured; None: expected under uniform routing.
    """
    work = [logits * counts.lm_head + tokens * (counts.active - counts.lm_head) for counts in (dense, moe)]
    read = moe.read(tokens) if distinct_experts is None else moe.read_with(distinct_experts)
    return PassBounds(active=work[0] / work[1], bytes_read=dense.read(tokens) / read)


def _attention(config: Mapping[str, Any], hidden: int) -> int:
    heads = _size(config, "num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, kv_heads * head_dim
    weights = 2 * hidden * q + 2 * hidden * kv
    base = config.get(BASE_FAMILY_KEY) or config.get("model_type")
    if base in DENSE_TYPES and config.get("model_type") in MOE_TYPES and base != "qwen2":
        return int(weights)  # biases, if the layout has any, are zero
    if base in ("qwen2", "qwen2_moe"):
        return int(weights + q + 2 * kv)  # always biases on q, k, v and none on o
    biased = config.get("attention_bias") or config.get("use_bias")
    return int(weights + (q + 2 * kv + hidden if biased else 0))


def _ffn(hidden: int, channels: int, *, bias: bool) -> int:
    return 3 * hidden * channels + (2 * channels + hidden if bias else 0)


# of the model type: experts that serve one token, experts of a layer
_EXPERT_KEYS = {
    "ernie4_5_moe": ("moe_k", "moe_num_experts"),
    "qwen2_moe": ("num_experts_per_tok", "num_experts"),
}


def moe_layers(config: Mapping[str, Any]) -> int:
    """Return the number of layers with experts of an L0-MoE; they are the top ones.

    Raises:
        L0MoEError: the config describes shared experts, or dense layers between those with experts.
    """
    layers = _size(config, "num_hidden_layers")
    shared = ("moe_num_shared_experts", "shared_expert_intermediate_size")
    interval = ("moe_layer_interval", "decoder_sparse_step")
    if any(config.get(key) for key in shared) or any(config.get(key, 1) != 1 for key in interval):
        raise L0MoEError(
            "config.json describes shared experts or MoE layers at an interval, which an L0-MoE never has; "
            "point to a folder written by the export stage."
        )
    if config["model_type"] == "qwen2_moe":
        return layers - len(config.get("mlp_only_layers") or ())
    end = config.get("moe_layer_end_index", -1)
    last = layers - 1 if end in (-1, None) else int(end)
    return last - int(config.get("moe_layer_start_index", 1)) + 1


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 0:
        raise L0MoEError(
            f"config.json has {key} = {value!r}, which must be a whole number; take it from the model's own config."
        )
    return value

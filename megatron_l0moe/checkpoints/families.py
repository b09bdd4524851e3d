"""The tables: which Hugging Face tensor is which Megatron tensor, for each supported layout.

Megatron's names are those of `sharded_state_dict` with `non_homogeneous_layers` (layers are not stacked), the
same for the local and the Transformer Engine spec (`modules/layer_specs.py`): the norms are named after the linear
layers that Transformer Engine fuses them into, except the MLP norm of an MoE layer, which stands alone.
"""

from dataclasses import dataclass

from megatron_l0moe.checkpoints.rules import QKV, Experts, GatedMLP, Rename, Rule, Zeros
from megatron_l0moe.sizes.architecture import Architecture


@dataclass(frozen=True, kw_only=True)
class MoEShape:
    """What an L0-MoE has beside its dense base."""

    dense_layers: int
    num_experts: int
    expert_ffn: int
    top_k: int
    renormalised: bool = True
    """Whether the weights of the top-k experts sum to 1 (softmax after top-k); else they are softmax's own."""


def dense_rules(architecture: Architecture) -> list[Rule]:
    """Table of the dense Llama, Mistral and Qwen2 families, which name their tensors alike."""
    rules = _ends(architecture)
    for layer in range(architecture.num_layers):
        rules += [*_attention(architecture, layer), *_dense_mlp(architecture, layer)]
    return rules


def ernie_moe_rules(architecture: Architecture, moe: MoEShape) -> list[Rule]:
    """Table of an L0-MoE as Ernie4.5-MoE: dense layers first, then routed experts only.

    Of a model with biases on q, k and v it is the form that only SGLang takes: biases on q, k, v and, zero, on o.
    """
    a = architecture
    rules = ernie_layers(a, moe.dense_layers)
    for layer in range(moe.dense_layers, a.num_layers):
        correction = f"model.layers.{layer}.mlp.moe_statics.e_score_correction_bias"
        rules += [*_experts(a, moe, layer), Zeros(hf=correction, shape=(1, moe.num_experts))]
    return rules


def ernie_layers(architecture: Architecture, dense_layers: int) -> list[Rule]:
    """Table of what surrounds the experts of an Ernie4.5-MoE: ends, attention, dense MLPs."""
    a = architecture
    rules = _ends(a)
    for layer in range(a.num_layers):
        rules += _attention(a, layer, interleaved_rope=True)
        if a.qkv_bias:
            rules.append(Zeros(hf=f"model.layers.{layer}.self_attn.o_proj.bias", shape=(a.hidden_size,)))
        if layer < dense_layers:
            rules += _dense_mlp(a, layer)
    return rules


def qwen2_moe_rules(architecture: Architecture, moe: MoEShape) -> list[Rule]:
    """Table of an L0-MoE as Qwen2-MoE: no shared expert, whose gate is there all the same, and always q/k/v biases.

    vLLM makes the biases whatever config.json says, and leaves what the checkpoint lacks unset.
    """
    a = architecture
    rows = {"q": a.num_attention_heads, "k": a.num_query_groups, "v": a.num_query_groups}
    rules = _ends(a)
    for layer in range(a.num_layers):
        hf = f"model.layers.{layer}"
        rules += _attention(a, layer)
        if not a.qkv_bias:
            rules += [
                Zeros(hf=f"{hf}.self_attn.{n}_proj.bias", shape=(count * a.head_dim,))
                for n, count in rows.items()
            ]
        if layer < moe.dense_layers:
            rules += _dense_mlp(a, layer)
            continue
        gate = f"{hf}.mlp.shared_expert_gate.weight"
        rules += [*_experts(a, moe, layer), Zeros(hf=gate, shape=(1, a.hidden_size))]
    return rules


def extra_states(architecture: Architecture, moe: MoEShape | None) -> dict[str, int]:
    """Names of the empty states (those of FP8) that Megatron's loader asks for, and in how many shards.

    The union of what the local and the Transformer Engine spec ask for.
    """
    states = {"decoder.final_layernorm._extra_state": 1}
    for layer in range(architecture.num_layers):
        prefix = f"decoder.layers.{layer}"
        for part in ("core_attention", "linear_qkv", "linear_proj"):
            states[f"{prefix}.self_attention.{part}._extra_state"] = 1
        if moe is not None and layer >= moe.dense_layers:
            mlp, shards = f"{prefix}.mlp.experts.experts", moe.num_experts
            states[f"{prefix}.pre_mlp_layernorm._extra_state"] = 1
        else:
            mlp, shards = f"{prefix}.mlp", 1
            # Of the separate MLP norm of an L0 layer, under its fused name (modules/layer_specs.py).
            states[f"{prefix}.mlp.linear_fc1.layer_norm__extra_state"] = 1
        for linear in ("linear_fc1", "linear_fc2"):
            states[f"{mlp}.{linear}._extra_state"] = shards
    return states


def is_training_state(name: str) -> bool:
    """Whether a Megatron tensor is of training alone: counters of routers, and what a frozen mask does not need."""
    if ".mlp.masks." in name:  # modules/mixture_of_masks.py
        return not name.endswith(".hard_mask")
    return ".mlp.router.expert_load." in name  # modules/router.py


def ignored_hf_names(architecture: Architecture) -> set[str]:
    """Tensors that old Hugging Face checkpoints hold although the model computes them itself."""
    return {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(architecture.num_layers)}


def empty_hf_names(architecture: Architecture, moe: MoEShape | None) -> set[str]:
    """Tensors of zero width that transformers writes of Qwen2-MoE's shared expert, which an L0-MoE does not have."""
    layers = range(moe.dense_layers, architecture.num_layers) if moe is not None else ()
    return {
        f"model.layers.{layer}.mlp.shared_expert.{projection}_proj.weight"
        for layer in layers
        for projection in ("gate", "up", "down")
    }


def _ends(a: Architecture) -> list[Rule]:
    embedding = (a.vocab_size, a.hidden_size)
    rules: list[Rule] = [
        Rename(megatron="embedding.word_embeddings.weight", hf="model.embed_tokens.weight", shape=embedding),
        Rename(megatron="decoder.final_layernorm.weight", hf="model.norm.weight", shape=(a.hidden_size,)),
    ]
    if not a.tied_embeddings:
        rules.append(Rename(megatron="output_layer.weight", hf="lm_head.weight", shape=embedding))
    return rules


def _attention(a: Architecture, layer: int, *, interleaved_rope: bool = False) -> list[Rule]:
    hf, megatron = f"model.layers.{layer}", f"decoder.layers.{layer}"
    rules: list[Rule] = [
        Rename(
            megatron=f"{megatron}.self_attention.linear_qkv.layer_norm_weight",
            hf=f"{hf}.input_layernorm.weight",
            shape=(a.hidden_size,),
        ),
        Rename(
            megatron=f"{megatron}.self_attention.linear_proj.weight",
            hf=f"{hf}.self_attn.o_proj.weight",
            shape=(a.hidden_size, a.num_attention_heads * a.head_dim),
        ),
    ]
    for suffix in ("weight", "bias") if a.qkv_bias else ("weight",):
        rules.append(
            QKV(
                megatron=f"{megatron}.self_attention.linear_qkv",
                hf=f"{hf}.self_attn",
                suffix=suffix,
                heads=a.num_attention_heads,
                groups=a.num_query_groups,
                head_dim=a.head_dim,
                hidden=a.hidden_size,
                interleaved_rope=interleaved_rope,
            )
        )
    return rules


def _dense_mlp(a: Architecture, layer: int) -> list[Rule]:
    hf, megatron = f"model.layers.{layer}.mlp", f"decoder.layers.{layer}.mlp"
    return [
        _mlp_norm(a, layer, "mlp.linear_fc1.layer_norm_weight"),
        GatedMLP(
            megatron=f"{megatron}.linear_fc1.weight",
            gate=f"{hf}.gate_proj.weight",
            up=f"{hf}.up_proj.weight",
            ffn=a.ffn_hidden_size,
            hidden=a.hidden_size,
        ),
        Rename(
            megatron=f"{megatron}.linear_fc2.weight",
            hf=f"{hf}.down_proj.weight",
            shape=(a.hidden_size, a.ffn_hidden_size),
        ),
    ]


def _mlp_norm(a: Architecture, layer: int, megatron: str) -> Rule:
    return Rename(
        megatron=f"decoder.layers.{layer}.{megatron}",
        hf=f"model.layers.{layer}.post_attention_layernorm.weight",
        shape=(a.hidden_size,),
    )


def _experts(a: Architecture, moe: MoEShape, layer: int) -> list[Rule]:
    hf, megatron = f"model.layers.{layer}.mlp", f"decoder.layers.{layer}.mlp"
    return [
        _mlp_norm(a, layer, "pre_mlp_layernorm.weight"),
        Rename(
            megatron=f"{megatron}.router.weight",
            hf=f"{hf}.gate.weight",
            shape=(moe.num_experts, a.hidden_size),
        ),
        Experts(
            fc1=f"{megatron}.experts.experts.linear_fc1.weight",
            fc2=f"{megatron}.experts.experts.linear_fc2.weight",
            hf=f"{hf}.experts.{{expert}}",
            num_experts=moe.num_experts,
            expert_ffn=moe.expert_ffn,
            hidden=a.hidden_size,
        ),
    ]


def moe_arguments(architecture: Architecture, moe: MoEShape) -> dict[str, object]:
    """Return Megatron's arguments of the experts, for `--use-checkpoint-args`."""
    frequency = [int(layer >= moe.dense_layers) for layer in range(architecture.num_layers)]
    return {
        "num_experts": moe.num_experts,
        "moe_layer_freq": frequency,
        "moe_ffn_hidden_size": moe.expert_ffn,
        "moe_router_topk": moe.top_k,
        "moe_router_pre_softmax": not moe.renormalised,
        "moe_grouped_gemm": False,
    }

"""What SGLang's own loader would do with an exported L0-MoE, from its released sources. No torch.

SGLang needs a GPU to run, so its rules are written down here and an export is held against them. Source: the wheel
sglang 0.5.23, srt/models/ernie4.py (`Ernie4_5_MoeForCausalLM`) unless another file is named; 0.5.2, the first wheel
with that file, has the same rules.

| rule | place |
|---|---|
| attention has qkv_proj and o_proj; both have biases with use_bias, else neither | :182, llama.py:207-220 |
| head_dim is read, and used as it is | llama.py:197 |
| RoPE turns neighbour pairs unless rope_is_neox_style is set | :168 |
| a layer has experts from moe_layer_start_index to moe_layer_end_index, every moe_layer_interval-th | :191-193 |
| dense MLPs and experts have no biases | :200, :104 |
| top-k weights are always made to sum to 1 | :99 |
| any activation but silu is refused | :84 |
| lm_head.weight is dropped with tied embeddings | :380 |
| names that begin with model.mtp_ are dropped | :382 |
| moe_statics.e_score_correction_bias is the gate's | :384-385 |
| q, k, v and gate, up of a dense MLP are parts of one parameter | :301-308 |
| projections of experts are parts of two stacked ones | layers/moe/fused_moe_triton/layer.py:1797-1822 |
| another name ends with KeyError | :419, :431 |
| a parameter that no tensor fills stays as it was allocated, without a word | :374-431 |

The last is why every part must be there. Shapes are those of one GPU.
"""

import re
from collections.abc import Mapping
from typing import Any

Shape = tuple[int, ...]
ARCHITECTURE = "Ernie4_5_MoeForCausalLM"
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "moe_num_experts", "moe_k", "moe_intermediate_size", "moe_layer_interval"),
)


def sglang_problems(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> list[str]:
    """Return what SGLang would refuse, drop or leave unset of a checkpoint, one clause each; empty: nothing.

    Args:
        config: content of config.json.
        shapes: of all tensors, by name.
    """
    problems = _config_problems(config)
    if problems:
        return problems
    missing = parts(config)
    for name, shape in sorted(shapes.items()):
        part = destination(name, tied=bool(config["tie_word_embeddings"]))
        if part is None:
            problems.append(f"{name} is dropped without a word")
        elif part not in missing:
            problems.append(f"{name} ends the loading with KeyError")
        elif missing.pop(part) != shape:
            problems.append(f"{name} has the shape {list(shape)}, which its parameter has not")
    problems += [f"{part} stays unset without a word" for part in sorted(missing)]
    return problems


def destination(name: str, *, tied: bool) -> str | None:
    """Return the part of a parameter that a checkpoint's tensor fills, or None if it is dropped."""
    if name.startswith("model.mtp_") or (tied and "lm_head.weight" in name):
        return None
    if match := _EXPERT.fullmatch(name):
        prefix, expert, projection = match.groups()
        parameter = "w2_weight" if projection == "down" else "w13_weight"
        return f"{prefix}.{parameter}[{int(expert)}, {projection}]"
    if "moe_statics.e_score_correction_bias" in name:
        name = name.replace("moe_statics", "gate")
    for projection in ("q", "k", "v"):
        if f".{projection}_proj" in name:
            return name.replace(f".{projection}_proj", ".qkv_proj") + f"[{projection}]"
    for projection in ("gate", "up"):
        if f".{projection}_proj" in name:
            return name.replace(f".{projection}_proj", ".gate_up_proj") + f"[{projection}]"
    return name


def parts(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return every part of every parameter that a checkpoint has to fill, with its shape."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    result: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        result["lm_head.weight"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            result[f"{prefix}.{norm}.weight"] = (hidden,)
        result |= _attention(config, f"{prefix}.self_attn")
        result |= (
            _experts(config, f"{prefix}.mlp") if _is_moe(config, layer) else _dense(config, f"{prefix}.mlp")
        )
    return result


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    if list(config.get("architectures") or ()) != [ARCHITECTURE]:
        return [f"architectures is {config.get('architectures')!r}, but these rules are of {ARCHITECTURE}"]
    problems = [
        f"{key} is {config.get(key)!r}, not a number above 0"
        for key in _SIZES
        if type(config.get(key)) is not int or config[key] < 1
    ]
    if config.get("hidden_act") != "silu":
        problems.append(f"hidden_act is {config.get('hidden_act')!r}, and only silu is supported")
    if config.get("rope_is_neox_style"):
        problems.append("rope_is_neox_style is set, but q and k were exported for neighbour pairs")
    if config.get("moe_num_shared_experts"):
        problems.append("moe_num_shared_experts is set, but an L0-MoE has no shared experts")
    problems += [
        f"{key} is missing, and another default is taken"
        for key in ("tie_word_embeddings", "moe_layer_start_index", "moe_layer_end_index", "use_bias")
        if key not in config
    ]
    return problems


def _is_moe(config: Mapping[str, Any], layer: int) -> bool:
    start, end = config["moe_layer_start_index"], config["moe_layer_end_index"]
    return bool(start <= layer <= end and (layer - start) % config["moe_layer_interval"] == 0)


def _attention(config: Mapping[str, Any], prefix: str) -> dict[str, Shape]:
    hidden, dim = config["hidden_size"], config["head_dim"]
    rows = {"q": config["num_attention_heads"] * dim, "k": config["num_key_value_heads"] * dim}
    rows["v"] = rows["k"]
    result: dict[str, Shape] = {f"{prefix}.qkv_proj.weight[{n}]": (size, hidden) for n, size in rows.items()}
    result[f"{prefix}.o_proj.weight"] = (hidden, rows["q"])
    if config["use_bias"]:
        result |= {f"{prefix}.qkv_proj.bias[{n}]": (size,) for n, size in rows.items()}
        result[f"{prefix}.o_proj.bias"] = (hidden,)
    return result


def _dense(config: Mapping[str, Any], prefix: str) -> dict[str, Shape]:
    hidden, channels = config["hidden_size"], config["intermediate_size"]
    return {
        f"{prefix}.gate_up_proj.weight[gate]": (channels, hidden),
        f"{prefix}.gate_up_proj.weight[up]": (channels, hidden),
        f"{prefix}.down_proj.weight": (hidden, channels),
    }


def _experts(config: Mapping[str, Any], prefix: str) -> dict[str, Shape]:
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    experts = config["moe_num_experts"]
    result: dict[str, Shape] = {
        f"{prefix}.gate.weight": (experts, hidden),
        f"{prefix}.gate.e_score_correction_bias": (1, experts),
    }
    for k in range(experts):
        for projection, parameter in (("gate", "w13_weight"), ("up", "w13_weight"), ("down", "w2_weight")):
            shape = (hidden, width) if projection == "down" else (width, hidden)
            result[f"{prefix}.experts.{parameter}[{k}, {projection}]"] = shape
    return result

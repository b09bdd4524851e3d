"""The shape of a dense model: read from a Hugging Face config, written as Megatron's flags. No torch.

Sizes are global (not those of one tensor-parallel rank). Those of the paper's base models stand here as in their
published config.json, so that plans need no download.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.layout_rules import JobSizes
from megatron_l0moe.recipe.recipe import Recipe, Section
from megatron_l0moe.runtime.json_files import read_json

_COMMON: dict[str, Any] = {"tie_word_embeddings": False, "torch_dtype": "bfloat16"}
LLAMA_3_8B: dict[str, Any] = _COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
}
MISTRAL_7B_V03: dict[str, Any] = LLAMA_3_8B | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 32768,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
MISTRAL_7B_V01: dict[str, Any] = MISTRAL_7B_V03 | {
    "vocab_size": 32000,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
}
QWEN2_7B: dict[str, Any] = _COMMON | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 131072,
    "use_sliding_window": False,
}
PUBLISHED = {
    "meta-llama-3-8b": LLAMA_3_8B,
    "llama-3-8b": LLAMA_3_8B,
    "mistral-7b-v0.1": MISTRAL_7B_V01,
    "mistral-7b-v0.3": MISTRAL_7B_V03,
    "qwen2-7b": QWEN2_7B,
}
"""The published sizes by the name of the folder in small letters."""


@dataclass(frozen=True, kw_only=True)
class DenseFamily:
    """What tells the dense families apart in config.json; their tensors are in `families.py`."""

    model_type: str
    hf_architecture: str
    qkv_bias: bool
    """Whether the q, k and v projections have biases (all else has none in every family)."""
    max_position_embeddings: int
    """The default of transformers, for a config.json that leaves it out."""
    sliding_window: int | None = None
    """The same."""


DENSE_FAMILIES = {
    family.model_type: family
    for family in (
        DenseFamily(
            model_type="llama",
            hf_architecture="LlamaForCausalLM",
            qkv_bias=False,
            max_position_embeddings=2048,
        ),
        DenseFamily(
            model_type="mistral",
            hf_architecture="MistralForCausalLM",
            qkv_bias=False,
            max_position_embeddings=131072,
            sliding_window=4096,
        ),
        DenseFamily(
            model_type="qwen2",
            hf_architecture="Qwen2ForCausalLM",
            qkv_bias=True,
            max_position_embeddings=32768,
        ),
    )
}

# Megatron hard-codes these three of Llama-3.1's RoPE scaling (core/models/common/embeddings/
# rotary_pos_embedding.py, _apply_scaling); only the factor is a flag.
MEGATRON_LLAMA3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Bounds for what a file says, before tables grow with it; far above any model.
MAX_LAYERS = 4096
MAX_EXPERTS = 65536
MAX_SIZE = 2**31 - 1
_MAX_NUMBER = 1e15
DEFAULT_SCALING_FACTOR = 8.0  # of Megatron's --rope-scaling-factor, without meaning where nothing is scaled


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes and switches of a dense Llama-like model (RMSNorm, SwiGLU, RoPE, grouped queries)."""

    family: str
    """`model_type` of config.json: a key of `DENSE_FAMILIES`."""
    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    """KV heads."""
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rotary_base: float
    rope_scaling: dict[str, Any] | None
    """Transformers' dictionary for the type `llama3`, without the base; None: plain RoPE."""
    tied_embeddings: bool
    qkv_bias: bool
    max_position_embeddings: int
    sliding_window: int | None = None
    """Mistral-7B-v0.1: a token sees this many tokens, itself included; None: all before it."""

    @property
    def exact_positions(self) -> int:
        """The longest sequence on which full causal attention, which is all that is trained and exported, is exact."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    @classmethod
    def from_hf(cls, folder: Path) -> "Architecture":
        """Read config.json of a Hugging Face checkpoint (transformers 4.x or 5.x form).

        Raises:
            L0MoEError: no such folder, no or broken config.json, or a model that is not supported.
        """
        return cls.from_config(read_config(folder), folder / "config.json")

    @classmethod
    def from_config(cls, config: dict[str, Any], source: Path) -> "Architecture":
        """Build from the dictionary of a config.json; `source` names it in messages."""
        family = _family(config, source)
        hidden = integer(config, "hidden_size", source)
        heads = integer(config, "num_attention_heads", source)
        groups = heads
        if config.get("num_key_value_heads") is not None:
            groups = integer(config, "num_key_value_heads", source)
        base, scaling = _rope(config, source)
        _refuse_what_megatron_lacks(config, family, source)
        architecture = cls(
            family=family.model_type,
            hidden_size=hidden,
            ffn_hidden_size=integer(config, "intermediate_size", source),
            num_layers=integer(config, "num_hidden_layers", source, most=MAX_LAYERS),
            num_attention_heads=heads,
            num_query_groups=groups,
            head_dim=_head_dim(config, hidden, heads, source),
            vocab_size=integer(config, "vocab_size", source),
            rms_norm_eps=_number(config, "rms_norm_eps", 1e-6, source),
            rotary_base=base,
            rope_scaling=scaling,
            tied_embeddings=_flag(config, "tie_word_embeddings", source),
            qkv_bias=family.qkv_bias,
            max_position_embeddings=integer(
                {"max_position_embeddings": family.max_position_embeddings, **config},
                "max_position_embeddings",
                source,
            ),
            sliding_window=_sliding_window(config, family, source),
        )
        if heads % groups:
            raise L0MoEError(
                f"{source}: num_attention_heads ({heads}) must be divisible by num_key_value_heads ({groups})."
            )
        return architecture

    def hf_config(self, dtype: str) -> dict[str, Any]:
        """Return config.json's dictionary in the transformers 4.57 form, which 5.x reads too.

        The 5.x form (`rope_parameters`) must not be written: 4.x ignores it and silently takes base 10000.
        """
        family = DENSE_FAMILIES[self.family]
        return {
            "architectures": [family.hf_architecture],
            "model_type": family.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_query_groups,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rotary_base,
            "rope_scaling": self.rope_scaling,
            "tie_word_embeddings": self.tied_embeddings,
            "torch_dtype": dtype,
            "use_cache": True,
            "initializer_range": 0.02,
            "attention_dropout": 0.0,
            **({"sliding_window": self.sliding_window} if self.family == "mistral" else {}),
            **({"use_sliding_window": False} if self.family == "qwen2" else {}),
            **({"attention_bias": False, "mlp_bias": False} if self.family == "llama" else {}),
        }

    def megatron_arguments(self) -> dict[str, Any]:
        """Return the values that Megatron's own parser makes of `megatron_flags`, by attribute name."""
        return {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "group_query_attention": True,
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.head_dim,
            "max_position_embeddings": self.exact_positions,
            "normalization": "RMSNorm",
            "norm_epsilon": self.rms_norm_eps,
            "swiglu": True,
            "position_embedding_type": "rope",
            "add_position_embedding": True,
            "rotary_base": self.rotary_base,
            "rotary_percent": 1.0,
            "use_rope_scaling": self.rope_scaling is not None,
            "rope_scaling_factor": self.rope_scaling["factor"]
            if self.rope_scaling
            else DEFAULT_SCALING_FACTOR,
            "add_bias_linear": False,
            "add_qkv_bias": self.qkv_bias,
            "untie_embeddings_and_output_weights": not self.tied_embeddings,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
        }

    def megatron_flags(self) -> list[str]:
        """Return Megatron's command-line flags of the dense model, without those of tokenizer and run."""
        values = self.megatron_arguments()
        flags = ["--group-query-attention", "--swiglu", "--disable-bias-linear"]
        named = (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "max_position_embeddings",
            "normalization",
            "norm_epsilon",
            "position_embedding_type",
            "rotary_percent",
            "attention_dropout",
            "hidden_dropout",
        )
        for name in named:
            flags += [f"--{name.replace('_', '-')}", str(values[name])]
        flags += ["--rotary-base", str(int(self.rotary_base))]
        if self.rope_scaling is not None:
            flags += ["--use-rope-scaling", "--rope-scaling-factor", str(self.rope_scaling["factor"])]
        if self.qkv_bias:
            flags.append("--add-qkv-bias")
        if not self.tied_embeddings:
            flags.append("--untie-embeddings-and-output-weights")
        return flags


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a Hugging Face checkpoint folder as a dictionary."""
    if not folder.is_dir():
        raise L0MoEError(
            f"Model folder {folder} does not exist; give the folder of a Hugging Face checkpoint "
            "(config.json, *.safetensors, tokenizer)."
        )
    file = folder / "config.json"
    if not file.is_file():
        raise L0MoEError(
            f"{folder} has no config.json; give the folder of a Hugging Face checkpoint, as "
            "`save_pretrained` or `hf download` writes it."
        )
    return read_json(file, "copy it again", finite=False)


def first_architecture(config: dict[str, Any]) -> str:
    """Return the name of the model's class as config.json gives it."""
    names = config.get("architectures")
    if isinstance(names, list) and names:
        return str(names[0])[:80]
    return f"model_type {config.get('model_type')}" if not names else str(names)[:80]


def _family(config: dict[str, Any], source: Path) -> DenseFamily:
    known = {family.hf_architecture: family for family in DENSE_FAMILIES.values()}
    name = first_architecture(config)
    if name not in known:
        raise L0MoEError(
            f"{source} is a model of architecture {name}, which is not supported; supported are "
            f"{', '.join(sorted(known))}, and an L0-MoE that this program exported."
        )
    return known[name]


def integer(config: dict[str, Any], key: str, source: Path, *, least: int = 1, most: int = MAX_SIZE) -> int:
    """Return a whole number of a config.json; raise L0MoEError where it is something else or out of bounds."""
    value = config.get(key)
    if type(value) is not int or value < least:
        raise L0MoEError(f"{source}: {key} must be a whole number above {least - 1}, got {str(value)[:40]}.")
    if value > most:
        raise L0MoEError(f"{source}: {key} must be at most {most}, got {str(value)[:40]}.")
    return value


def _number(config: dict[str, Any], key: str, default: float, source: Path) -> float:
    value: Any = config.get(key, default)
    if not _is_positive(value):
        raise L0MoEError(f"{source}: {key} must be a number above 0, got {str(value)[:40]}.")
    return float(value)


def _is_positive(value: Any) -> bool:
    """Whether it is a number above 0, neither infinite nor so large that it is a mistake, nor true."""
    return type(value) in (int, float) and 0 < value < _MAX_NUMBER


def _flag(config: dict[str, Any], key: str, source: Path) -> bool:
    """Return a switch that is off where it is absent or null."""
    value = config.get(key)
    if value is not None and type(value) is not bool:
        raise L0MoEError(f"{source}: {key} must be true or false, got {str(value)[:40]!r}.")
    return bool(value)


def _head_dim(config: dict[str, Any], hidden: int, heads: int, source: Path) -> int:
    if config.get("head_dim") is not None:
        return integer(config, "head_dim", source)
    if hidden % heads:
        raise L0MoEError(
            f"{source}: hidden_size ({hidden}) must be divisible by num_attention_heads ({heads}) where head_dim "
            "is not given; give head_dim, or copy the checkpoint again."
        )
    return hidden // heads


def _rope(config: dict[str, Any], source: Path) -> tuple[float, dict[str, Any] | None]:
    """Return RoPE's base and its scaling (None or Llama-3.1's) from either form of config.json."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise L0MoEError(
            f"{source}: rope_parameters or rope_scaling must be an object, got {str(found)[:40]}."
        )
    parameters = dict(found)
    base = _number({"rope_theta": 10000.0, **config, **parameters}, "rope_theta", 10000.0, source)
    if parameters.pop("rope_theta", base) != config.get("rope_theta", base):
        raise L0MoEError(
            f"{source}: rope_theta is {config['rope_theta']}, but {base} in rope_parameters, and transformers 4 and 5 "
            "would take one each; remove the wrong one."
        )
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    partial = parameters.pop("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        raise L0MoEError(f"{source}: partial_rotary_factor {partial} is not supported, it must be 1.")
    if base != int(base):
        raise L0MoEError(f"{source}: rope_theta must be a whole number for Megatron, got {base}.")
    unknown = sorted(parameters.keys() - {"factor", *MEGATRON_LLAMA3_SCALING})
    if unknown and kind in ("default", "llama3"):
        raise L0MoEError(f"{source}: RoPE with {unknown[0]} is not supported.")
    if kind == "default":
        return float(base), None
    if kind != "llama3":
        raise L0MoEError(
            f"{source}: RoPE scaling of type {kind!r} is not supported; supported are 'default' and 'llama3'."
        )
    for key, value in MEGATRON_LLAMA3_SCALING.items():
        if parameters.get(key) != value:
            raise L0MoEError(
                f"{source}: RoPE scaling has {key} = {parameters.get(key)}, but Megatron computes with "
                f"{value} only; other values cannot be expressed."
            )
    factor: Any = parameters.get("factor")
    if not _is_positive(factor):
        raise L0MoEError(
            f"{source}: RoPE scaling of type 'llama3' needs a number above 0 as factor, got {factor!r}; copy the "
            "checkpoint again."
        )
    return float(base), {
        "rope_type": "llama3",
        "factor": float(factor),
        **MEGATRON_LLAMA3_SCALING,
    }


def _refuse_what_megatron_lacks(config: dict[str, Any], family: DenseFamily, source: Path) -> None:
    if config.get("quantization_config") is not None:
        raise L0MoEError(
            f"{source} has a quantization_config, but quantised weights are not supported; take the model's checkpoint "
            "in bfloat16."
        )
    if (weights := config.get("transformers_weights")) is not None:
        raise L0MoEError(f"{source}: transformers_weights = {str(weights)[:80]!r} is not supported.")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise L0MoEError(f"{source}: hidden_act must be 'silu' (SwiGLU), got {activation!r}.")
    for key in ("attention_bias", "mlp_bias"):
        if family.model_type != "qwen2" and _flag(config, key, source):
            raise L0MoEError(f"{source}: {key} = true is not supported for {family.hf_architecture}.")


def _sliding_window(config: dict[str, Any], family: DenseFamily, source: Path) -> int | None:
    if family.model_type == "qwen2" and _flag(config, "use_sliding_window", source):
        raise L0MoEError(
            f"{source}: use_sliding_window = true (a window in some layers) is not supported for "
            f"{family.hf_architecture}; set it to false in a copy of the checkpoint to use full attention."
        )
    if family.model_type != "mistral" or config.get("sliding_window", family.sliding_window) is None:
        return None
    return integer({"sliding_window": family.sliding_window, **config}, "sliding_window", source)


def job_sizes(recipe: Recipe, section: Section, architecture: Architecture) -> JobSizes:
    """Return what a layout of a training section has to divide: the recipe's sizes and the model's."""
    return dataclasses.replace(
        recipe.job_sizes(section),
        layers=architecture.num_layers,
        heads=architecture.num_attention_heads,
        query_groups=architecture.num_query_groups,
        ffn=architecture.ffn_hidden_size,
        vocab=architecture.vocab_size,
    )

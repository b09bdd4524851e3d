"""The layouts of an exported L0-MoE: config.json in both directions, and the table of tensors. One entry per form.

config.json is written in the form of transformers 4.57, which 5.x reads too (see `Architecture.hf_config`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_l0moe.checkpoints.families import MoEShape, ernie_moe_rules, qwen2_moe_rules
from megatron_l0moe.checkpoints.rules import Rule
from megatron_l0moe.conversion.targets import Form
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.sizes.architecture import (
    DENSE_FAMILIES,
    MAX_EXPERTS,
    MAX_LAYERS,
    Architecture,
    first_architecture,
    integer,
)
from megatron_l0moe.sizes.parameters import BASE_FAMILY_KEY

ENGINES_KEY = "l0moe_engines"
"""Key of config.json that lists the engines which compute this checkpoint rightly; for the model card."""
# Keys of the dense families that mean nothing, or something else, in an MoE layout.
_DENSE_ONLY = ("attention_bias", "mlp_bias", "sliding_window", "use_sliding_window")

Config = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class MoELayout:
    """One layout that transformers has a model class for."""

    hf_architecture: str
    model_type: str
    config: Callable[[Architecture, MoEShape], Config]
    """What config.json holds beside the sizes of the dense model."""
    rules: Callable[[Architecture, MoEShape], list[Rule]]
    shape: Callable[[Config, Path], MoEShape]
    """The experts that a config.json describes."""

    def hf_config(
        self, architecture: Architecture, moe: MoEShape, dtype: str, engines: Sequence[str]
    ) -> Config:
        """Return config.json without the ids of special tokens."""
        base = {k: v for k, v in architecture.hf_config(dtype).items() if k not in _DENSE_ONLY}
        return {
            **base,
            "architectures": [self.hf_architecture],
            "model_type": self.model_type,
            # The layouts know no window over all layers; up to its length it makes no difference.
            "max_position_embeddings": architecture.exact_positions,
            "moe_intermediate_size": moe.expert_ffn,
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "output_router_logits": False,
            **self.config(architecture, moe),
            BASE_FAMILY_KEY: architecture.family,
            ENGINES_KEY: list(engines),
        }

    def read(self, config: Config, source: Path) -> tuple[Architecture, MoEShape]:
        """Return what `hf_config` was made from.

        Raises:
            L0MoEError: a key that is missing, or another value than an L0-MoE has, such as shared experts.
        """
        family = config.get(BASE_FAMILY_KEY) or ("qwen2" if _has_bias(config, self.model_type) else "llama")
        if family not in DENSE_FAMILIES:
            raise L0MoEError(
                f"{source}: {BASE_FAMILY_KEY} is {family!r}, but must be one of {', '.join(sorted(DENSE_FAMILIES))}."
            )
        base = {key: value for key, value in config.items() if key not in _DENSE_ONLY}
        dense = {"architectures": [DENSE_FAMILIES[family].hf_architecture], "sliding_window": None}
        architecture = Architecture.from_config({**base, **dense}, source)
        try:
            moe = self.shape(config, source)
        except (KeyError, TypeError) as error:
            raise L0MoEError(
                f"{source} lacks the key {error}, or it is not a number; export again."
            ) from error
        for key, value in self.config(architecture, moe).items():
            if config.get(key) != value:
                raise L0MoEError(
                    f"{source}: {key} must be {value!r} in an L0-MoE, got {config.get(key)!r}; only checkpoints that "
                    "this program exported can be imported."
                )
        return architecture, moe


def layout_of(config: Config, source: Path) -> MoELayout:
    """Return the layout of a config.json."""
    name = first_architecture(config)
    form: Form = "qwen2_moe" if config.get("model_type") == "qwen2_moe" else "ernie4_5_moe"
    if LAYOUTS[form].hf_architecture != name:
        known = sorted(layout.hf_architecture for layout in LAYOUTS.values())
        raise L0MoEError(
            f"{source} is a model of architecture {name}, not an L0-MoE; those are {', '.join(known)}."
        )
    return LAYOUTS[form]


def _has_bias(config: Config, model_type: str) -> bool:
    return bool(config.get("use_bias" if model_type == "ernie4_5_moe" else "qkv_bias"))


def _ernie_config(a: Architecture, moe: MoEShape) -> Config:
    return {
        # Explicit: the layout's default is true.
        "tie_word_embeddings": a.tied_embeddings,
        "use_bias": a.qkv_bias,
        "moe_k": moe.top_k,
        "moe_num_experts": moe.num_experts,
        "moe_num_shared_experts": 0,
        "moe_layer_start_index": moe.dense_layers,
        "moe_layer_end_index": a.num_layers - 1,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
    }


def _ernie_shape(config: Config, source: Path) -> MoEShape:
    return MoEShape(
        dense_layers=integer(config, "moe_layer_start_index", source, least=0, most=MAX_LAYERS),
        num_experts=integer(config, "moe_num_experts", source, most=MAX_EXPERTS),
        expert_ffn=integer(config, "moe_intermediate_size", source),
        top_k=integer(config, "moe_k", source),
    )


def _qwen2_config(a: Architecture, moe: MoEShape) -> Config:
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(moe.dense_layers)),
        "norm_topk_prob": moe.renormalised,
        "shared_expert_intermediate_size": 0,
        "qkv_bias": True,
        "use_sliding_window": False,
        "max_window_layers": a.num_layers,
    }


def _qwen2_shape(config: Config, source: Path) -> MoEShape:
    return MoEShape(
        dense_layers=len(config["mlp_only_layers"]),
        num_experts=integer(config, "num_experts", source, most=MAX_EXPERTS),
        expert_ffn=integer(config, "moe_intermediate_size", source),
        top_k=integer(config, "num_experts_per_tok", source),
        renormalised=bool(config["norm_topk_prob"]),
    )


_ERNIE = MoELayout(
    hf_architecture="Ernie4_5_MoeForCausalLM",
    model_type="ernie4_5_moe",
    config=_ernie_config,
    rules=ernie_moe_rules,
    shape=_ernie_shape,
)
LAYOUTS: dict[Form, MoELayout] = {
    "ernie4_5_moe": _ERNIE,
    # The same with biases, for SGLang; use_bias of config.json tells the two apart.
    "ernie4_5_moe_bias": _ERNIE,
    "qwen2_moe": MoELayout(
        hf_architecture="Qwen2MoeForCausalLM",
        model_type="qwen2_moe",
        config=_qwen2_config,
        rules=qwen2_moe_rules,
        shape=_qwen2_shape,
    ),
}

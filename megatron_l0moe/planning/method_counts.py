"""Parameter counts of an exported model, whichever method made it, from its config.json alone (no torch)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_l0moe.planning.parameters import ParameterCounts, count_parameters
from megatron_l0moe.recipe_methods import ModelMethod


def exported_counts(
    method: ModelMethod, config: Mapping[str, Any], open_blocks: float | None = None
) -> ParameterCounts:
    """Count the weights of an export.

    Args:
        method: of its recipe.
        config: its config.json.
        open_blocks: of a DSMoE: of a token, mean over tokens and layers; an outcome of training, so it was measured.
    """
    if method == "dsmoe":
        assert open_blocks is not None, "what is active in a DSMoE is measured"
        return dsmoe_counts(config, open_blocks=open_blocks)
    return mom_counts(config) if method == "mom" else count_parameters(config)


def dsmoe_counts(config: Mapping[str, Any], *, open_blocks: float) -> ParameterCounts:
    """Count the weights of a DSMoE, its blocks as experts and its gates as routers; see `exported_counts`."""
    base = count_parameters({**config, "model_type": str(config["model_type"]).removeprefix("dsmoe_")})
    layers, blocks = config["num_hidden_layers"], config["num_blocks"]
    upper = layers - config["num_dense_layers"]
    one_layer = base.dense_ffn // layers
    return replace(
        base,
        dense_ffn=one_layer * (layers - upper),
        experts=one_layer * upper,
        routers=upper * blocks * config["hidden_size"],
        num_experts=blocks,
        top_k=open_blocks,
    )


def mom_counts(config: Mapping[str, Any]) -> ParameterCounts:
    """Count the weights of a Mixture-of-Masks, shared experts as a dense FFN, with the zeros that fill experts up."""
    base = count_parameters({**config, "moe_num_shared_experts": 0})
    upper = config["num_hidden_layers"] - config["moe_layer_start_index"]
    shared = config["moe_num_shared_experts"] * config["moe_intermediate_size"]
    return replace(base, dense_ffn=base.dense_ffn + upper * 3 * config["hidden_size"] * shared)

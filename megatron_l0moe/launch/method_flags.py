"""The flags that make a training job one of its recipe's method. Pure text."""

from megatron_l0moe.recipe.layout import Flags
from megatron_l0moe.recipe.recipe import Recipe
from megatron_l0moe.sizes.architecture import Architecture

BALANCE_COEFFICIENT = 0.01
"""alpha of eq. 7."""
Z_COEFFICIENT = 0.003
"""alpha * lambda of eq. 7 and eq. 3: 0.01 * 0.3."""


def stage_flags(recipe: Recipe, stage: str | None = None) -> Flags:
    """Return the stage, `stage` or what the stage `moe` of the recipe's chain is to the program, and its shape."""
    flags: Flags = {
        "l0-stage": stage or ("moe" if recipe.method == "l0moe" else recipe.method),
        "l0-dense-layers": recipe.model.dense_layers,
    }
    if recipe.method == "l0moe":
        flags["l0-expert-ffn"] = recipe.model.expert_ffn
    return flags


def expert_flags(recipe: Recipe, architecture: Architecture) -> Flags:
    """Return the flags of Megatron's MoE layers; none for a method without them."""
    if recipe.method != "l0moe":
        return {}
    dense = recipe.model.dense_layers
    return {
        "num-experts": recipe.model.num_experts,
        "moe-ffn-hidden-size": recipe.model.expert_ffn,
        "moe-router-topk": recipe.model.top_k,
        "moe-layer-freq": f"([0]*{dense}+[1]*{architecture.num_layers - dense})",
        "moe-router-dtype": "fp32",
        "moe-router-load-balancing-type": "none",  # eq. 3 is attached by our router
        "moe-aux-loss-coeff": BALANCE_COEFFICIENT,
        "moe-z-loss-coeff": Z_COEFFICIENT,
    }


def method_flags(recipe: Recipe) -> Flags:
    """Return the flags of the method's own section."""
    if recipe.method == "dsmoe":
        blocks = recipe.dsmoe
        return {
            "l0-blocks": blocks.blocks,
            "l0-block-threshold": blocks.threshold,
            "l0-block-sparsity-coeff": blocks.sparsity_coefficient,
            "l0-block-seed": recipe.seed,
        }
    if recipe.method == "mom":
        masks = recipe.mom
        return {
            "l0-masks": masks.masks,
            "l0-masks-top-k": masks.top_k,
            "l0-masks-target": masks.target,
            "l0-masks-balance-coeff": masks.balance_coefficient,
            "l0-masks-seed": recipe.seed,
            "l0-retention-control": "lagrangian",  # the budget is one of a single mask
            "l0-mask-lr": masks.mask_learning_rate,
            "l0-noise-seed": recipe.seed,
        }
    return {}

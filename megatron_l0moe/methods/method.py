"""What the chain asks of a method; the base class answers for L0-MoE, `NAME_method.py` for the method NAME.

A further method also has a section in `recipe/recipe.py`, layers in `modules/`, its stage in `training/arguments.py`,
and a layout in `conversion/`; see docs/architecture.md.
"""

import importlib
from collections.abc import Mapping
from typing import Any, get_args

from megatron_l0moe.recipe.layout import Flags
from megatron_l0moe.recipe.recipe import ModelMethod, Recipe
from megatron_l0moe.sizes.architecture import Architecture
from megatron_l0moe.sizes.parameters import ParameterCounts, count_parameters, l0moe_counts

Config = Mapping[str, Any]
"""The fields of a config.json."""


class Method:
    """L0-MoE, and what a method may do otherwise."""

    name: ModelMethod = "l0moe"
    section_flags: frozenset[str] = frozenset()
    """Flags that follow from the method's own section of the recipe, so `flags:` may not set them."""
    trains_masks: bool = False
    """Whether the stage `moe` trains L0 masks, whose retention is reported."""
    opens_blocks: bool = False
    """Whether tokens open blocks, and not the experts that a router chooses."""
    exported_code: str = ""
    """The file of code that an export needs."""

    def check_model(self, recipe: Recipe, architecture: Architecture) -> None:
        """Refuse a dense model that the method cannot be applied to."""

    def flags(self, recipe: Recipe) -> Flags:
        """Return the flags of the training program that the method's own section stands for."""
        return {}

    def shapes(self, recipe: Recipe, architecture: Architecture) -> str:
        """Say the sizes of what is made, for a dry run."""
        model = recipe.model
        return (
            f"{model.dense_layers} dense + {architecture.num_layers - model.dense_layers} MoE layers of "
            f"{model.num_experts} experts of width {model.expert_ffn} (dense FFN: {architecture.ffn_hidden_size}), "
            f"{model.top_k} for each token"
        )

    def planned_counts(self, recipe: Recipe, config: Config) -> ParameterCounts:
        """Count the weights of what is made, from the dense model's config."""
        model = recipe.model
        return l0moe_counts(
            dict(config),
            dense_layers=model.dense_layers,
            num_experts=model.num_experts,
            expert_ffn=model.expert_ffn,
            top_k=model.top_k,
        )

    def parameters(self, dense: ParameterCounts, made: ParameterCounts) -> str:
        """Say the weights of what is made beside those of the dense model, for a dry run."""
        return (
            f"{millions(made.total)} in all, {millions(made.active)} active for a token "
            f"(dense: {millions(dense.total)}, {millions(dense.active)})"
        )

    def exported_counts(self, config: Config, open_blocks: float | None = None) -> ParameterCounts:
        """Count the weights of an export.

        Args:
            config: its config.json.
            open_blocks: of a method with `opens_blocks`: those of a token, mean over tokens and layers; an outcome of
                training, so it was measured.
        """
        return count_parameters(config)


def method_of(name: ModelMethod) -> Method:
    """Return what the chain asks of a method."""
    if name == Method.name:
        return Method()
    method: Method = importlib.import_module(f"megatron_l0moe.methods.{name}_method").METHOD
    return method


def section_flags() -> frozenset[str]:
    """Return the flags that the sections of all methods stand for."""
    return frozenset().union(*(method_of(name).section_flags for name in get_args(ModelMethod)))


def millions(count: int) -> str:
    """Return a number of weights in millions, or in billions from ten on."""
    return f"{count / 1e9:.2f} B" if count >= 10**10 else f"{count / 1e6:.1f} M"

"""Mixture-of-Masks in the chain (Liu et al., ACL 2025 long 768); its layers are `modules/mixture_of_masks.py`."""

from dataclasses import replace

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.methods.method import Config, Method, millions
from megatron_l0moe.recipe.layout import Flags
from megatron_l0moe.recipe.recipe import Recipe
from megatron_l0moe.sizes.architecture import Architecture
from megatron_l0moe.sizes.parameters import ParameterCounts, count_parameters


class MixtureOfMasks(Method):
    """Masks over one shared FFN, of which a token uses the mixture that its router chooses."""

    name = "mom"
    section_flags = frozenset({"l0-masks", "l0-masks-top-k", "l0-masks-target", "l0-masks-balance-coeff"})
    trains_masks = True

    def check_model(self, recipe: Recipe, architecture: Architecture) -> None:
        """Refuse biases that the exported layout has no place for."""
        if architecture.qkv_bias:
            raise L0MoEError(
                "method mom exports as Ernie4.5-MoE, which has no biases on q, k and v, and "
                f"{recipe.model.path} has them; give a base without them."
            )

    def flags(self, recipe: Recipe) -> Flags:
        """Return the flags of its section."""
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

    def shapes(self, recipe: Recipe, architecture: Architecture) -> str:
        """Say how many masks there are and what a token's mixture keeps."""
        dense_layers, masks = recipe.model.dense_layers, recipe.mom
        return (
            f"{dense_layers} dense + {architecture.num_layers - dense_layers} layers of {masks.masks} masks over the "
            f"FFN of {architecture.ffn_hidden_size}, {masks.top_k} for each token, which together keep "
            f"{masks.target:.0%} of it"
        )

    def planned_counts(self, recipe: Recipe, config: Config) -> ParameterCounts:
        """Count the dense model, which all masks share."""
        return count_parameters(config)

    def parameters(self, dense: ParameterCounts, made: ParameterCounts) -> str:
        """Say what is in memory; the export's weights are not known before."""
        return (
            f"in training those of the dense model ({millions(dense.total)}), routers and masks; what the export holds "
            "is an outcome of training"
        )

    def exported_counts(self, config: Config, open_blocks: float | None = None) -> ParameterCounts:
        """Count shared experts as a dense FFN, with the zeros that fill experts up."""
        base = count_parameters({**config, "moe_num_shared_experts": 0})
        upper = config["num_hidden_layers"] - config["moe_layer_start_index"]
        shared = config["moe_num_shared_experts"] * config["moe_intermediate_size"]
        return replace(base, dense_ffn=base.dense_ffn + upper * 3 * config["hidden_size"] * shared)


METHOD = MixtureOfMasks()

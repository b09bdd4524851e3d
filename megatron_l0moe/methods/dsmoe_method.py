"""DSMoE in the chain (Lv et al., 2025, arXiv 2502.12455); its layers are `modules/dsmoe.py`."""

from dataclasses import replace

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.methods.method import Config, Method, millions
from megatron_l0moe.recipe.layout import Flags
from megatron_l0moe.recipe.recipe import Recipe
from megatron_l0moe.sizes.architecture import Architecture
from megatron_l0moe.sizes.parameters import ParameterCounts, count_parameters


class DSMoE(Method):
    """The FFN as blocks that a token's gates open."""

    name = "dsmoe"
    section_flags = frozenset({"l0-blocks", "l0-block-threshold", "l0-block-sparsity-coeff"})
    opens_blocks = True
    exported_code = "modeling_dsmoe.py"

    def check_model(self, recipe: Recipe, architecture: Architecture) -> None:
        """Refuse a number of blocks that cannot be of equal width."""
        blocks, ffn = recipe.dsmoe.blocks, architecture.ffn_hidden_size
        if ffn % blocks:
            instead = min((n for n in range(2, ffn + 1) if ffn % n == 0), key=lambda n: abs(n - blocks))
            raise L0MoEError(
                f"dsmoe.blocks ({blocks}) must divide the dense model's FFN width, {ffn}, since blocks are of equal "
                f"width; the nearest that does is {instead}."
            )

    def flags(self, recipe: Recipe) -> Flags:
        """Return the flags of its section."""
        return {
            "l0-blocks": recipe.dsmoe.blocks,
            "l0-block-threshold": recipe.dsmoe.threshold,
            "l0-block-sparsity-coeff": recipe.dsmoe.sparsity_coefficient,
            "l0-block-seed": recipe.seed,
        }

    def shapes(self, recipe: Recipe, architecture: Architecture) -> str:
        """Say how many blocks of which width there are."""
        dense_layers, blocks, ffn = (
            recipe.model.dense_layers,
            recipe.dsmoe.blocks,
            architecture.ffn_hidden_size,
        )
        return (
            f"{dense_layers} dense + {architecture.num_layers - dense_layers} layers of {blocks} blocks of width "
            f"{ffn // blocks} (dense FFN: {ffn}); a token uses those its gates open"
        )

    def planned_counts(self, recipe: Recipe, config: Config) -> ParameterCounts:
        """Count with all blocks open; how many are is an outcome of training."""
        blocks = recipe.dsmoe.blocks
        shape = {"num_blocks": blocks, "num_dense_layers": recipe.model.dense_layers}
        return self.exported_counts({**config, **shape}, open_blocks=blocks)

    def parameters(self, dense: ParameterCounts, made: ParameterCounts) -> str:
        """Say the weights, of which the gates are the new ones."""
        return (
            f"{millions(made.total)} in all, {made.routers:,} of them gates (dense: {millions(dense.total)}); how many "
            "are active for a token is an outcome of training"
        )

    def exported_counts(self, config: Config, open_blocks: float | None = None) -> ParameterCounts:
        """Count its blocks as experts and its gates as routers."""
        assert open_blocks is not None, "what is active in a DSMoE is measured"
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


METHOD = DSMoE()

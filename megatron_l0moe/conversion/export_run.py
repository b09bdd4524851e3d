"""The export stage: what the recipe's method trained, as a Hugging Face checkpoint."""

from pathlib import Path

from megatron_l0moe.conversion.export import export_dsmoe, export_moe, export_mom
from megatron_l0moe.conversion.model_card import recipe_facts
from megatron_l0moe.recipe.recipe import Recipe


def export_run(recipe: Recipe, checkpoints: Path, out: Path) -> dict[str, object]:
    """Export the checkpoints of the stage `moe` to the folder `out`; returns numbers for the manifest.

    Raises:
        L0MoEError: see `export.py`.
    """
    base, card = Path(recipe.model.path), recipe_facts(recipe)
    if recipe.method == "dsmoe":
        return export_dsmoe(checkpoints, base, out, card=card)
    if recipe.method == "mom":
        return export_mom(checkpoints, base, out, card=card)
    return export_moe(
        checkpoints,
        base,
        out,
        dense_layers=recipe.model.dense_layers,
        top_k=recipe.model.top_k,
        target=recipe.export.target,
        card=card,
    )

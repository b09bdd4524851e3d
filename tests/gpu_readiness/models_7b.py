"""The three base models of examples/, and their recipes with each of their layouts."""

import tempfile
from pathlib import Path

from megatron_l0moe.recipe.recipe import Recipe, load_recipe
from megatron_l0moe.sizes.architecture import LLAMA_3_8B, MISTRAL_7B_V03, QWEN2_7B, Architecture

EXAMPLES = Path(__file__).parents[2] / "examples"
GPUS = (8, 64, 512)

CONFIGS = {"llama3_8b": LLAMA_3_8B, "mistral_7b": MISTRAL_7B_V03, "qwen2_7b": QWEN2_7B}


def architecture(recipe: str) -> Architecture:
    """Return the base model of a recipe of examples/."""
    return Architecture.from_config(CONFIGS[recipe], Path("config.json"))


def recipe_text(name: str, gpus: int) -> str:
    """Return a recipe of examples/ as a user would change it for another number of GPUs."""
    text = (EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.count("\ngpus: 64 ") == 1
    return text.replace("\ngpus: 64 ", f"\ngpus: {gpus} ")


def recipe_on(name: str, gpus: int) -> Recipe:
    """Load it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(recipe_text(name, gpus), encoding="utf-8")
        return load_recipe(file)

"""The three base models of examples/."""

from pathlib import Path

from megatron_l0moe.conversion.architecture import Architecture
from megatron_l0moe.planning.published import LLAMA_3_8B, MISTRAL_7B_V03, QWEN2_7B

CONFIGS = {"llama3_8b": LLAMA_3_8B, "mistral_7b": MISTRAL_7B_V03, "qwen2_7b": QWEN2_7B}


def architecture(recipe: str) -> Architecture:
    """Return the base model of a recipe of examples/."""
    return Architecture.from_config(CONFIGS[recipe], Path("config.json"))

"""Checks that need the model's config.json but no work: what is wrong is said before the first hour is spent."""

from pathlib import Path

from megatron_l0moe.conversion.architecture import Architecture
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe import ParallelSection, Recipe


def check(recipe: Recipe) -> Architecture:
    """Check a recipe against the model and the files it names; returns the model's architecture.

    Raises:
        L0MoEError: something is missing or does not fit; one sentence.
    """
    architecture = Architecture.from_hf(Path(recipe.model.path))
    check_sizes(recipe, architecture)
    if not Path(recipe.data.corpus).is_dir():
        raise L0MoEError(
            f"data.corpus: the folder {recipe.data.corpus} does not exist; give a folder of *.jsonl or *.jsonl.zst "
            "shards, relative to the folder that the command is run in."
        )
    return architecture


def check_sizes(recipe: Recipe, architecture: Architecture) -> None:
    """Check the recipe's sizes against those of the dense model."""
    model = recipe.model
    if model.dense_layers >= architecture.num_layers:
        raise L0MoEError(
            f"model.dense_layers ({model.dense_layers}) must be smaller than the model's {architecture.num_layers} "
            f"layers; use at most {architecture.num_layers - 1}."
        )
    if model.expert_ffn > architecture.ffn_hidden_size:
        raise L0MoEError(
            f"model.expert_ffn ({model.expert_ffn}) must be at most the dense model's FFN width, "
            f"{architecture.ffn_hidden_size}."
        )
    if recipe.data.seq_length > architecture.max_position_embeddings:
        raise L0MoEError(
            f"data.seq_length ({recipe.data.seq_length}) must be at most the model's "
            f"max_position_embeddings, {architecture.max_position_embeddings}."
        )
    if architecture.qkv_bias:
        raise L0MoEError(
            f"The family {architecture.family} has biases on q, k and v, which the export layout (Ernie4.5-MoE) cannot "
            "hold for every engine; use a Llama or Mistral base."
        )
    if recipe.evaluation.parity_positions > recipe.data.seq_length:
        raise L0MoEError(
            f"evaluation.parity_positions ({recipe.evaluation.parity_positions}) must be at most data.seq_length "
            f"({recipe.data.seq_length}); lower it."
        )
    _check_layout("expert_training.parallel", recipe.expert_training.parallel, architecture)
    _check_layout("moe_training.parallel", recipe.moe_training.parallel, architecture)


def check_one_node(recipe: Recipe, *sections: str) -> None:
    """Refuse to start jobs for several nodes on this machine; without sections: any job of the recipe."""
    for section in sections or ("expert_training", "moe_training"):
        nodes = getattr(recipe, section).parallel.nodes
        if nodes > 1:
            raise L0MoEError(
                f"{section}.parallel.nodes is {nodes}, and this command runs on one machine; show the commands for "
                "the cluster with --dry-run, or set nodes to 1."
            )


def _check_layout(section: str, parallel: ParallelSection, architecture: Architecture) -> None:
    sizes = (
        ("KV heads", architecture.num_query_groups, "tensor", parallel.tensor),
        ("FFN channels", architecture.ffn_hidden_size, "tensor", parallel.tensor),
        ("layers", architecture.num_layers, "pipeline", parallel.pipeline),
    )
    for what, number, key, size in sizes:
        if number % size:
            fitting = max(n for n in range(1, size + 1) if number % n == 0)
            raise L0MoEError(
                f"{section}.{key} ({size}) must divide the model's {number} {what}; the nearest size below that "
                f"fits is {fitting}."
            )

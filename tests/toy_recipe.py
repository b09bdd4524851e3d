"""A small recipe, a config.json to go with it, and helpers to change single keys."""

import copy
import json
from pathlib import Path
from typing import Any

import yaml

from megatron_l0moe.recipe.recipe import load_recipe
from megatron_l0moe.runs.stages import Run
from megatron_l0moe.sizes.architecture import Architecture

MINIMAL: dict[str, Any] = {
    "name": "toy",
    "model": {"path": "models/toy", "dense_layers": 1, "num_experts": 4, "expert_ffn": 16},
    "data": {
        "corpus": "corpus",
        "embedding_model": "models/embedding",
        "iterations": 3,
        "seq_length": 32,
        "tokens_per_expert": 640,
        "tokens_per_set": 1280,
    },
    "expert_training": {"global_batch_size": 2},
    "evaluation": {"parity_positions": 16},
}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def changed(**changes: Any) -> dict[str, Any]:
    """Return the minimal recipe with `section__key=value` changes; None removes a key."""
    raw = copy.deepcopy(MINIMAL)
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = raw
        for section in sections:
            place = place.setdefault(section, {})
        if value is None:
            place.pop(key)
        else:
            place[key] = value
    return raw


def write_recipe(folder: Path, **changes: Any) -> Path:
    """Write the minimal recipe with changes; returns the file."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(changed(**changes)), encoding="utf-8")
    return file


def make_run(folder: Path, **changes: Any) -> Run:
    """Return a run of the minimal recipe whose folders lie in `folder`."""
    file = write_recipe(folder, **changes)
    return Run(recipe=load_recipe(file), recipe_file=file, runs_dir=folder / "runs")


def of_method(method: str, **changes: Any) -> dict[str, Any]:
    """Return the changes of `changed` that make the recipe one of a method beside L0-MoE."""
    return {"method": method, "model__expert_ffn": None, **changes}


def write_model(folder: Path) -> Path:
    """Write a config.json; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return folder


def toy_architecture() -> Architecture:
    """Return the architecture of the config above."""
    return Architecture.from_config(CONFIG, Path("config.json"))

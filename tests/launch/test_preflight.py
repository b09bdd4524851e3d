"""A recipe against its model, before any work."""

from pathlib import Path
from typing import Any

import pytest
from toy_recipe import make_run, toy_architecture, write_model

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.launch import preflight


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__dense_layers": 4},
            r"model\.dense_layers \(4\) must be smaller than the model's 4 layers; use at most 3",
        ),
        (
            {"model__expert_ffn": 65},
            r"model\.expert_ffn \(65\) must be at most the dense model's FFN width, 64",
        ),
        (
            {"data__seq_length": 128, "data__tokens_per_set": 5000},
            r"data\.seq_length \(128\) must be at most .* 64",
        ),
        (
            {"moe_training__parallel": {"tensor": 4, "processes": 4}},
            r"moe_training\.parallel\.tensor \(4\) must divide the model's 2 KV heads; .* fits is 2",
        ),
        (
            {"expert_training__parallel": {"pipeline": 3, "processes": 3}},
            r"expert_training\.parallel\.pipeline \(3\) must divide the model's 4 layers; .* fits is 2",
        ),
    ],
)
def test_sizes(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(L0MoEError, match=message):
        preflight.check_sizes(make_run(tmp_path, **changes).recipe, toy_architecture())


def test_good_recipe(tmp_path: Path) -> None:
    preflight.check_sizes(make_run(tmp_path).recipe, toy_architecture())


def test_missing_corpus(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    run = make_run(tmp_path, model__path=str(model), data__corpus=str(tmp_path / "none"))
    with pytest.raises(L0MoEError, match=r"data\.corpus: the folder .*none does not exist"):
        preflight.check(run.recipe)


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(L0MoEError, match=r"Model folder models/toy does not exist"):
        preflight.check(make_run(tmp_path).recipe)

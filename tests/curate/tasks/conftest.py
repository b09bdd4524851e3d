"""A small corpus, its recipe, and what an undisturbed run in this process makes of it."""

from collections.abc import Callable
from pathlib import Path

import curate_worlds as worlds
import pytest

from megatron_l0moe.curate import sampling, steps
from megatron_l0moe.curate.curate import curate
from megatron_l0moe.recipe.recipe import Recipe


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the steps into several units each; the driver decides that, so it holds for tasks in other processes too."""
    for name, value in worlds.SMALL_UNITS.items():
        monkeypatch.setattr(steps, name, value)
    # One round of tokenising, since every round costs Ray and Slurm new processes; test_curate.py has two rounds.
    monkeypatch.setattr(sampling, "TOKENISE_MARGIN", 2.0)


@pytest.fixture
def corpus(tmp_path: Path, write_lines, topic_text) -> Path:
    return worlds.write_corpus(tmp_path / "corpus", write_lines, topic_text)


@pytest.fixture
def recipe_with(corpus: Path, tiny_lm: Path, tiny_encoder: Path) -> Callable[..., Recipe]:
    return lambda **data: worlds.make_recipe(corpus, tiny_lm, tiny_encoder, **data)


@pytest.fixture
def expected(small_units, recipe_with, tmp_path: Path) -> dict[str, str]:
    """Checksums of the result of one task in this process."""
    curate(recipe_with(), tmp_path / "expected")
    return worlds.checksums(tmp_path / "expected")

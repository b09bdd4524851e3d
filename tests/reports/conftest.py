"""A made-up run folder for every test of the reports."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from run_folder import build_run

from megatron_l0moe.recipe.recipe import Recipe


@pytest.fixture
def made_up_run(tmp_path: Path) -> tuple[Recipe, Path]:
    return build_run(tmp_path)


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """One that no test may change."""
    return build_run(tmp_path_factory.mktemp("shared"))

"""One uninterrupted run of the toy chain, made once; the tests read it, or go on from copies of its stages."""

from pathlib import Path

import pytest
from whole_chain import toy_world as toy


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def straight(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted run."""
    runs = tmp_path_factory.mktemp("straight")
    done = toy.run(recipe, runs)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return runs / "toy"

"""Recipes, cluster files and command lines out of pieces that do not fit: a sentence each time, never a traceback."""

import contextlib
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_recipe import changed, write_recipe
from typer.testing import CliRunner

from megatron_l0moe import cli
from megatron_l0moe.chain.slurm.cluster import load_cluster
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.recipe import load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = [yaml.safe_load(file.read_text()) for file in sorted((ROOT / "examples").glob("*.yaml"))]
CLUSTERS = [yaml.safe_load(file.read_text()) for file in sorted((ROOT / "slurm" / "clusters").glob("*.yaml"))]
FAST = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
PLAIN = (
    *(
        "2026-13-45",
        "2026-02-30",
        "2026-12-01",
        "2026-12-01 25:00:00",
        "12:00:00",
        "1:30.5",
        "0644",
        "0o17",
        "0x1F",
    ),
    *(
        "0b11",
        "1_000",
        "2024_11",
        "1e-4",
        "1e999",
        "1234e5",
        "1.10",
        ".5",
        "+1",
        "on",
        "Off",
        "yes",
        "n",
        "~",
        "Null",
    ),
    *(
        "",
        ".inf",
        "-.inf",
        ".nan",
        "!!int abc",
        "!!float abc",
        "!!bool maybe",
        "!!timestamp foo",
        "!!binary x",
        "=",
        "<<",
    ),
    *(
        "!!python/object:os.system ls",
        "!!set {a}",
        "!!omap [a: 1]",
        "*gone",
        "&a [*a]",
        "? [a]",
        "9" * 5000,
        "0x" + "f" * 5000,
    ),
    *(
        "[" * 3000,
        "[" * 40 + "]" * 40,
        "{a: " * 600,
        '"\\ud800"',
        '"a\\nb"',
        '"\\0"',
        "'\u2028'",
        "100000000",
        "-1",
        "0",
    ),
    *(
        "10000001",
        "9223372036854775808",
        "1e5",
        "'x' * 9",
        "x" * 5000,
        "a/" * 3000,
        "[1, 2]",
        "{a: 1}",
        "true",
        "--save",
    ),
)
"""Values as they are written."""
TEXTS = st.one_of(
    st.sampled_from(PLAIN),
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(lambda number: yaml.safe_dump(number).split("\n")[0]),
)
KEYS = st.sampled_from(
    (
        "flags",
        "sbatch",
        "environment",
        "layouts",
        "parallel",
        "name",
        "seed",
        "on",
        "~",
        "[a]",
        "1",
        "save=x",
        "a\\nb",
        "x" * 300,
    )
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to all values."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return (
        [path, *(place for key, item in inside for place in places(item, (*path, key)))]
        if path
        else [place for key, item in inside for place in places(item, (key,))]
    )


@st.composite
def damaged(draw: st.DrawFn, examples: list[dict[str, Any]]) -> str:
    """Return the text of an example in which some values or keys are others."""
    raw = copy.deepcopy(draw(st.sampled_from(examples)))
    written: dict[str, str] = {}
    for number in range(draw(st.integers(1, 3))):
        *path, key = draw(st.sampled_from(places(raw) or [("name",)]))
        section = raw
        for part in path:
            section = section[part]
        mark = f"MARK{number}MARK"
        written[mark] = draw(TEXTS)
        if isinstance(section, dict) and draw(st.integers(0, 4)) == 0:
            new = f"KEY{number}KEY"
            written[new] = draw(KEYS)
            section[new] = mark
        else:
            section[key] = mark
    text = yaml.safe_dump(raw, sort_keys=False)
    for mark, value in written.items():
        text = text.replace(mark, value)
    return text


def refused_or_read(load: Callable[[Path], object], file: Path, text: str) -> None:
    with contextlib.suppress(UnicodeEncodeError):  # of what cannot be written to a file at all
        file.write_text(text, encoding="utf-8")
    begun = time.process_time()
    try:
        load(file)
    except L0MoEError as error:
        sentence = str(error)
        assert "\n" not in sentence
        assert str(file) in sentence
        sentence.encode()
        assert len(sentence) < 2500
    assert time.process_time() - begun < 5


@FAST
@given(text=st.one_of(damaged(RECIPES), damaged([changed()])))
def test_damaged_recipes(tmp_path: Path, text: str) -> None:
    refused_or_read(load_recipe, tmp_path / "recipe.yaml", text)


@FAST
@given(text=damaged(CLUSTERS))
def test_damaged_cluster_files(tmp_path: Path, text: str) -> None:
    refused_or_read(load_cluster, tmp_path / "cluster.yaml", text)


@FAST
@given(
    text=st.one_of(st.text(), TEXTS, st.lists(TEXTS, max_size=4).map("\n".join)),
    load=st.sampled_from((load_recipe, load_cluster)),
)
def test_arbitrary_text(tmp_path: Path, text: str, load: Callable[[Path], object]) -> None:
    refused_or_read(load, tmp_path / "file.yaml", text)


@pytest.mark.parametrize("place", ["name: {}", "moe_training: {{flags: {{x: {}}}}}", "seed: {}"])
def test_every_odd_value(tmp_path: Path, place: str) -> None:
    text = yaml.safe_dump({key: item for key, item in changed().items() if key not in place})
    for value in PLAIN:
        refused_or_read(load_recipe, tmp_path / "recipe.yaml", text + place.format(value) + "\n")


ODD_WORDS = st.one_of(
    st.sampled_from(
        (
            "",
            "-",
            "--",
            "/dev/null/x",
            "/proc/x",
            "/dev/null",
            "x" * 300,
            "a/" * 3000,
            "a\nb",
            "\udcff",
            "-1",
            "nan",
            "1e9",
        )
    ),
    st.text(max_size=8),
    st.integers().map(str),
)
COMMANDS = (
    *("run", "plan", "status", "cancel", "inspect"),
    *(
        "experts",
        "assemble",
        "moe",
        "export",
        "evaluate",
        "report",
    ),  # convert and curate import for ten seconds
)
OPTIONS = (
    "--runs-dir",
    "--from",
    "--until",
    "--launcher",
    "--cluster",
    "--gpus",
    "--gpu",
    "--mfu",
    "--index",
    "--phase",
    "--heads",
)


@FAST
@given(
    command=st.sampled_from(COMMANDS),
    argument=st.one_of(st.none(), ODD_WORDS),
    options=st.lists(st.tuples(st.sampled_from(OPTIONS), ODD_WORDS), max_size=2),
)
def test_odd_command_lines(
    tmp_path: Path, command: str, argument: str | None, options: list[tuple[str, str]]
) -> None:
    """The model does not exist, so nothing is begun; a usage error, a sentence or help, and never a traceback."""
    words = [command, str(write_recipe(tmp_path)) if argument is None else argument]
    words += [word for pair in options for word in pair]
    with contextlib.chdir(tmp_path):  # folders that the words name
        result = CliRunner().invoke(cli.app, words + (["--dry-run"] if command == "run" else []))
    assert isinstance(result.exception, SystemExit | None), (words, result.exception)
    assert result.exit_code in (0, 2), words


def test_the_fuzz_can_fail(tmp_path: Path) -> None:
    def load(file: Path) -> None:
        raise KeyError(file)

    with pytest.raises(KeyError):
        refused_or_read(load, tmp_path / "recipe.yaml", "")
    with pytest.raises(AssertionError):
        refused_or_read(lambda file: time.sleep(0) or _raise(L0MoEError("two\nlines")), tmp_path / "x", "")


def _raise(error: Exception) -> None:
    raise error

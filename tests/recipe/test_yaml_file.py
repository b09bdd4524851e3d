"""What is written and what YAML reads: the same, or one sentence with the file, the key and the line."""

from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from toy_recipe import changed, write_recipe

from megatron_l0moe.chain.slurm.cluster import Cluster, load_cluster
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.recipe import RecipeFile, load_recipe
from megatron_l0moe.recipe.yaml_file import FREE_VALUES, MOST_BYTES, Settings

CLUSTER = "gpus_per_node: 8\ncpus_per_node: 96\n"


def cluster(folder: Path, text: str) -> Cluster:
    file = folder / "cluster.yaml"
    file.write_text(CLUSTER + text, encoding="utf-8")
    return load_cluster(file)


def flags(folder: Path, text: str) -> dict[str, Any]:
    file = write_recipe(folder)
    file.write_text(file.read_text() + f"moe_training:\n  flags: {{{text}}}\n", encoding="utf-8")
    return load_recipe(file).moe_training.flags


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sbatch: {time-min: 12:00:00}", r'sbatch\.time-min: a time must be text; put it in quotes, "12:00:00"'),
        ("sbatch: {wckey: 0123}", r"sbatch\.wckey: 0123 begins with 0, which makes it an octal number \(line 3\)"),
        ("sbatch: {wckey: 1_000}", r"sbatch\.wckey: 1_000 is not passed on as it is written.*quotes, '1_000'"),
        ("sbatch: {comment: no}", r"sbatch\.comment: no is not passed on as it is written.*quotes, 'no'"),
        ("sbatch: {comment: 0x10}", r"sbatch\.comment: 0x10 is not passed on"),
        ("stages: {moe: {sbatch: {comment: on}}}", r"stages\.moe\.sbatch\.comment: on is not passed on"),
        ("environment: {A: yes}", r"environment\.A: yes is not passed on as it is written"),
        ("environment: {A: ~}", r"environment\.A: ~ is not passed on"),
        ("environment: {on: '1'}", r"'on'|True is no name|key is not allowed"),
        ("container: {image: x, options: {a: off}}", r"container\.options\.a: off is not passed on"),
        ("account: 012345", r"account: 012345 begins with 0"),
        ("partition: on", r"partition: .*got on, which YAML reads as True \(line 3\); put it in quotes"),
        ("partition: 2026-12-01", r"partition: .*got 2026-12-01 \(line 3\); put it in quotes"),
        ("partition: 5", r"partition: .*got 5 \(line 3\); put it in quotes"),
        ("partition: 2026-13-01", r"2026-13-01 is no timestamp \(line 3\); correct it, or put it in quotes"),
        ("partition: !!int abc", r"abc is no int \(line 3\)"),
        ("partition: !!bool maybe", r"maybe is no bool \(line 3\)"),
        ('memory_per_node: "5G\\n"', r"memory must be text such as"),
        (f"memory_per_node: '{'9' * 400}G'", r"memory must be text such as"),
        ("experts_at_once: 010", r"experts_at_once: 010 begins with 0"),
        ("partition: " + "[" * 2000, r"values lie in each other more than 50 deep"),
        ("partition: " + "[" * 60 + "]" * 60, r"values lie in each other more than 50 deep.* \(line 3\)"),
        ("max_requeues: " + "9" * 5000, r"the number 9+\.\.\.9+ has more than 40 digits \(line 3\)"),
        ('partition: "\\ud800"', r"partition: a text may not hold the character '\\ud800'; remove it"),
        ("x0: &x0 [1]\n" + "".join(f"x{n}: &x{n} [{f'*x{n - 1},' * 9}]\n" for n in range(1, 7)), r"more than 100000"),
        ("partition: x\n\tqos: y", r"is not valid YAML: .*found character '\\t'.* \(line 4, column 1\)"),
    ],
)  # fmt: skip
def test_cluster_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(L0MoEError, match=message) as caught:
        cluster(tmp_path, text)
    assert str(tmp_path / "cluster.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ('partition: "a\\nb"', "partition"),
        ('account: "a\\rb"', "account"),
        ('qos: "a\\u2028b"', "qos"),
        ('gres: "gpu\\ntouch x"', "gres"),
        ('constraint: "a\\0b"', "constraint"),
        ('reservation: "a\\x1bb"', "reservation"),
        ('modules: ["a\\nb"]', "modules"),
        ('python: "a\\nb"', "python"),
        ('mpi: "a\\nb"', "mpi"),
        ('sbatch: {comment: "a\\nb"}', "sbatch"),
        ('sbatch: {"a\\nb": x}', "sbatch"),
        ('environment: {A: "a\\nb"}', "environment"),
        ('container: {image: "a\\nb"}', "container.image"),
        ('stages: {moe: {qos: "a\\nb"}}', "stages.moe.qos"),
    ],
)
def test_no_value_leaves_its_line_of_a_script(tmp_path: Path, line: str, where: str) -> None:
    with pytest.raises(L0MoEError, match=f": {where}: .*(may not hold the character|may hold small letters)"):
        cluster(tmp_path, line)


def test_shell_lines_may_be_several(tmp_path: Path) -> None:
    assert cluster(tmp_path, "setup:\n- |\n  a\n  \tb\n").setup == ["a\n\tb\n"]
    with pytest.raises(L0MoEError, match="setup: a text may not hold the character"):
        cluster(tmp_path, 'setup: ["a\\0b"]')


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("x: 1e-4", 1e-4),
        ("x: 1E+2", 100.0),
        ("x: 10_000", 10_000),
        ("x: 0", 0),
        ("x: -3", -3),
        ("x: 0.45", 0.45),
        ("x: 1.0", 1.0),
        ("x: .5", 0.5),
        ("x: true", True),
        ("x: 'on'", "on"),
        ("x: '12:00:00'", "12:00:00"),
        ("x: 1a", "1a"),
    ],
)
def test_flags_that_are_read_as_written(tmp_path: Path, text: str, read: object) -> None:
    assert flags(tmp_path, text) == {"x": read}


@pytest.mark.parametrize(
    "value",
    [
        "2024_11",
        "1234e5",
        "1.10",
        "on",
        "No",
        "~",
        "0644",
        "12:00:00",
        "1:30.5",
        "0b11",
        "+1",
        "1e999",
        ".inf",
        ".nan",
    ],
)
def test_flags_that_would_be_others(tmp_path: Path, value: str) -> None:
    with pytest.raises(L0MoEError, match=r"moe_training\.flags\.x.*(quotes|number or text)"):
        flags(tmp_path, f"x: {value}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"save=/elsewhere": true', "the name 'save=/elsewhere' may hold small letters, digits and '-' only"),
        ('"a b": 1', "may hold small letters"),
        ("x: '--save=/elsewhere'", "which begins with '-' and would be another flag"),
        ("x: 9223372036854775808", "must fit into 64 bits"),
    ],
)
def test_flags_that_hold_other_flags(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(L0MoEError, match=message):
        flags(tmp_path, text)


def test_backend_arguments_and_languages(tmp_path: Path) -> None:
    tasks = {"tasks": ["gsm8k"], "backend_arguments": {"revision": "MARK"}}
    for value, message in (
        ("1234e5", "revision: 1234e5 is not passed on"),
        ("yes", "revision: yes is not passed on"),
    ):
        file = write_recipe(tmp_path, evaluation__benchmarks=tasks)
        file.write_text(file.read_text().replace("MARK", value))
        with pytest.raises(L0MoEError, match=message):
            load_recipe(file)
    file = write_recipe(tmp_path, data__filters={"languages": ["en", "MARK"]})
    file.write_text(file.read_text().replace("MARK", "no"))
    with pytest.raises(L0MoEError, match=r"data\.filters\.languages\.1: .*got no, which YAML reads as False"):
        load_recipe(file)
    file.write_text(file.read_text().replace("no\n", "'no'\n"))
    assert load_recipe(file).data.filters.languages == ["en", "no"]


@pytest.mark.parametrize("option", ["acc", "tim", "job-nam", "time=1", "A"])
def test_sbatch_options_that_would_be_others(tmp_path: Path, option: str) -> None:
    with pytest.raises(L0MoEError, match=r"short form of|may hold small letters"):
        cluster(tmp_path, f"sbatch: {{'{option}': x}}")
    assert cluster(tmp_path, "sbatch: {gpus: 4, mail-type: FAIL}").sbatch == {"gpus": 4, "mail-type": "FAIL"}


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 2**70},
        {"seed": -1},
        {"seed": 0},  # Megatron takes none
        {"name": "x" * 300},
        {"gpus": 10_000_001},
        {"model__num_experts": 10_000_001},
        {"moe_training__parallel": {"processes": 10_000_001}},
        {"expert_training__at_once": 10_000_001},
        {"data__iterations": 10**9},
        {"data__tokens_per_set": 2**64},
        {"data__executor": {"tasks": 10**9}},
        {"moe_training__learning_rate": float("inf")},
        {"moe_training__learning_rate": float("nan")},
        {"data__beta": float("nan")},
        {"data__delta": float("-inf")},
        {"data__filters": {"quality_signals": {"x": {"min": float("inf")}}}},
        {"data__filters": {"quality_signals": {"x": {"min": 2.0, "max": 1.0}}}},
        {"method": "mom", "model__expert_ffn": None, "mom": {"masks": 10**9, "top_k": 5 * 10**8}},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_are_bounded(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(L0MoEError) as caught:
        load_recipe(write_recipe(tmp_path, **changes))
    assert len(str(caught.value)) < 500


def test_places_that_are_no_files(tmp_path: Path) -> None:
    for path in ("x" * 300 + ".yaml", "a/" * 3000, "a\0b", "a\nb", "\udcff"):
        with pytest.raises(L0MoEError) as caught:
            load_recipe(tmp_path / path)
        assert str(caught.value).isprintable()
    (tmp_path / "large.yaml").write_text("#" * (MOST_BYTES + 1))
    with pytest.raises(L0MoEError, match="bytes, and a settings file has 1048576 at most"):
        load_recipe(tmp_path / "large.yaml")


def scalar_mappings(model: type[BaseModel], name: str = "") -> set[str]:
    """Return the keys that hold mappings from free names to single values."""
    found: set[str] = set()

    def look(annotation: Any, key: str) -> None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.update(scalar_mappings(annotation))
        elif get_origin(annotation) is dict:
            value = get_args(annotation)[1]
            if isinstance(value, type) and issubclass(value, BaseModel):
                look(value, key)
            else:
                found.add(key)
        elif isinstance(annotation, UnionType) or get_origin(annotation) is not None:
            for part in get_args(annotation):
                look(part, key)

    for key, field in model.model_fields.items():
        look(field.annotation, key)
    return found


def test_all_free_values_are_known() -> None:
    assert scalar_mappings(RecipeFile) | scalar_mappings(Cluster) == FREE_VALUES

    class Other(Settings):
        words: dict[str, str]

    assert scalar_mappings(Other) == {"words"}


def test_the_minimal_files_are_read(tmp_path: Path) -> None:
    """The control of all the above."""
    assert load_recipe(write_recipe(tmp_path)).name == "toy"
    assert cluster(tmp_path, "").gpus_per_node == 8
    assert yaml.safe_load(write_recipe(tmp_path).read_text()) == changed()

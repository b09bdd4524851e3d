"""The table of the chain, and which change of a recipe invalidates which stage."""

import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
from toy_recipe import make_run

import megatron_l0moe
from megatron_l0moe.chain import dry_run, forecast, stage_work
from megatron_l0moe.chain.slurm.cluster import StageJobs
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.recipe import section_hash
from megatron_l0moe.runs.stages import (
    CHAIN,
    STAGE_NAMES,
    chain,
    config_hash,
    selection,
    spec_of,
    stage_command,
    stages,
)

PACKAGE = Path(megatron_l0moe.__file__).parent


def invalidated(tmp_path: Path, **changes: Any) -> set[str]:
    before, after = make_run(tmp_path).recipe, make_run(tmp_path, **changes).recipe
    return {name for name in STAGE_NAMES if config_hash(name, before) != config_hash(name, after)}


@pytest.mark.parametrize(
    ("changes", "stages_after"),
    [
        ({"evaluation__repeats": 9}, {"evaluate", "report"}),
        ({"moe_training__learning_rate": 0.5}, {"moe", "export", "evaluate", "report"}),
        ({"moe_training__flags": {"bf16": True}}, {"moe", "export", "evaluate", "report"}),
        (
            {"expert_training__mask_learning_rate": 0.5},
            {"experts", "assemble", "moe", "export", "evaluate", "report"},
        ),
        (
            {"expert_training__train_weights": False},
            {"experts", "assemble", "moe", "export", "evaluate", "report"},
        ),
        ({"data__beta": 0.25}, set(STAGE_NAMES) - {"convert"}),
        ({"data__domain_key": "folder"}, set(STAGE_NAMES) - {"convert"}),
        ({"model__top_k": 1}, {"assemble", "moe", "export", "evaluate", "report"}),
        ({"model__path": "models/other"}, set(STAGE_NAMES)),
        ({"seed": 2}, set(STAGE_NAMES) - {"convert"}),
        # Not settings of the result: where and how fast it is computed.
        ({"moe_training__parallel": {"processes": 2, "expert": 2, "threads": 3}}, set()),
        ({"expert_training__save_interval": 7, "moe_training__save_interval": 7}, set()),
        ({"data__executor": {"kind": "ray", "workers": 4, "tasks": 9}}, set()),
    ],
)
def test_what_a_change_invalidates(tmp_path: Path, changes: dict[str, Any], stages_after: set[str]) -> None:
    assert invalidated(tmp_path, **changes) == stages_after


def test_inputs_come_before(tmp_path: Path) -> None:
    for position, spec in enumerate(CHAIN):
        assert set(spec.inputs) <= set(STAGE_NAMES[:position])


def test_experts_have_one_folder_each(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert [stage.folder.name for stage in stages(run, "experts")] == ["000", "001", "002", "003"]
    (assemble,) = stages(run, "assemble")
    assert [folder.name for folder in assemble.inputs] == ["convert", "000", "001", "002", "003"]


def test_selection() -> None:
    assert [spec.name for spec in selection("l0moe", "moe", "evaluate")] == ["moe", "export", "evaluate"]
    assert selection("l0moe", None, None) == CHAIN
    with pytest.raises(L0MoEError, match=r"There is no stage 'expert' \(did you mean 'experts'\?\)"):
        selection("l0moe", "expert", None)
    with pytest.raises(L0MoEError, match="--from moe comes after --until curate"):
        selection("l0moe", "moe", "curate")


@pytest.mark.parametrize(
    ("folder", "stage"), [("data", "curate"), ("evaluation", "evaluate"), ("reports", "report")]
)
def test_stage_declares_every_setting_that_its_code_reads(folder: str, stage: str) -> None:
    """A setting that is read but not declared would let a stale result pass for a new one."""
    declared: set[str] = set()
    pending = [stage]
    while pending:
        spec = spec_of(pending.pop(), "l0moe")
        declared |= {*spec.settings, *spec.added}
        pending += spec.inputs
    if "method_settings" in declared:
        declared.add("method")  # a part of it
    for file in sorted((PACKAGE / folder).glob("*.py")):
        for path in recipe_reads(ast.parse(file.read_text(encoding="utf-8"))):
            covered = path in declared or path.split(".")[0] in declared
            assert covered or path in {"moe_global_batch_size", "expert_steps", "moe_steps", "name"}, (
                f"{file}: {path}"
            )


def recipe_reads(tree: ast.Module) -> set[str]:
    """Return the settings read as `recipe.section.key` or `recipe.key`, without sections that are passed on whole."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts: list[str] = []
            inner: ast.expr = node
            while isinstance(inner, ast.Attribute):
                parts.insert(0, inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name) and inner.id == "recipe":
                found.add(".".join(parts[:2]))
    sections = {"model", "data", "expert_training", "moe_training", "evaluation"}
    return {path for path in found if path not in sections} - {"model_dump", "model_dump_json"}


def test_reads_are_found() -> None:
    tree = ast.parse("d = recipe.data\nx = recipe.model.top_k\ny = other.model.path\nz = recipe.seed")
    assert recipe_reads(tree) == {"model.top_k", "seed"}


def test_a_key_that_came_later_keeps_old_hashes(tmp_path: Path) -> None:
    """A run folder from before there was `data.domain_key` goes on."""
    recipe = make_run(tmp_path).recipe
    own = {
        "seed": recipe.seed,
        "model.path": recipe.model.path,
        "model.num_experts": recipe.model.num_experts,
        "data": recipe.data.model_dump(exclude={"executor", "set_passes", "domain_key"}),
        "expert_training.global_batch_size": recipe.expert_training.global_batch_size,
        "moe_training.sequences_per_domain": recipe.moe_training.sequences_per_domain,
    }
    assert config_hash("curate", recipe) == section_hash("curate", own, {})


def test_no_verify_goes_into_every_command(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert "--no-verify" not in stage_command(run, "moe")
    assert stage_command(dataclasses.replace(run, verify=False), "moe") == [
        *stage_command(run, "moe"),
        "--no-verify",
    ]


def test_reads_are_of_stages_that_are_inputs() -> None:
    """What a stage reads comes from the inputs that its rows of the chain name, whatever the method."""
    rows = [spec for method in ("l0moe", "dsmoe", "mom") for spec in chain(method)]
    for row in CHAIN:
        assert set(row.reads) <= {
            previous for spec in rows if spec.name == row.name for previous in spec.inputs
        }


def test_each_stage_has_what_bears_its_name() -> None:
    """The functions that the table's head names, and a section in the cluster file."""
    for name in STAGE_NAMES:
        assert inspect.isfunction(getattr(stage_work, name))
        assert inspect.isfunction(getattr(dry_run, f"_{name}"))
        assert inspect.isfunction(getattr(forecast, f"_{name}"))
    assert set(StageJobs.model_fields) == set(STAGE_NAMES)

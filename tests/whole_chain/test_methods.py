"""`method:` of a recipe: the whole chains of DSMoE and Mixture-of-Masks, cut small, with every real part."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from whole_chain import toy_world as toy

from megatron_l0moe.checkpoints.torch_dist import CheckpointReader

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
pytestmark = pytest.mark.slow
DEADLINE_SECONDS = 600


def recipe_of(world: Path, method: str, **section: object) -> Path:
    """Write the recipe of docs/methods.md with the toy world's sizes and some keys of its method; returns the file."""
    toy_recipe = yaml.safe_load(world.read_text(encoding="utf-8"))
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    raw, other = map(yaml.safe_load, blocks)
    assert raw["method"] == "dsmoe"
    if method == "mom":
        del raw["dsmoe"]
        raw |= {"name": "mom", "method": "mom", **other}
    raw["model"] |= {key: toy_recipe["model"][key] for key in ("path", "dense_layers", "num_experts")}
    raw["data"] = toy_recipe["data"]
    raw["expert_training"] = {"global_batch_size": 2}
    raw["moe_training"] |= {"micro_batch_size": 2, "learning_rate": 1e-3, "save_interval": 3}
    raw["evaluation"] = toy_recipe["evaluation"]
    raw[method] |= section
    file = world.with_name(f"{method}.yaml")
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return file


def changed(file: Path, **flags: object) -> Path:
    """Add flags to the training of a recipe; returns its file."""
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    raw["moe_training"]["flags"] |= flags
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def recipes(recipe: Path) -> dict[str, Path]:
    schedule = {"l0-open-steps": 2, "l0-freeze-fraction": 0.3}
    return {
        "dsmoe": recipe_of(recipe, "dsmoe", blocks=4, threshold=0.49),
        "mom": changed(recipe_of(recipe, "mom", masks=4, target=0.6), **schedule),
    }


@pytest.fixture(scope="module")
def runs(straight: Path, recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both runs, side by side, from the data of the L0-MoE run: `convert` and `curate` do not depend on the method."""
    folder = tmp_path_factory.mktemp("runs")
    processes = []
    for method, file in recipes.items():
        for stage in ("convert", "curate"):
            shutil.copytree(straight / stage, folder / method / stage)
        with (folder / f"{method}.log").open("w") as log:
            words = toy.command(file, folder)
            processes.append(subprocess.Popen(words, stdout=log, stderr=log, env=toy.environment()))
    for method, process in zip(recipes, processes, strict=True):
        code = process.wait(timeout=DEADLINE_SECONDS)
        said = (folder / f"{method}.log").read_text(encoding="utf-8")
        assert code == 0, said[-3000:]
        assert said.count("done before") == 2
    return folder


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


def test_dsmoe(runs):
    run = runs / "dsmoe"
    stages = sorted(file.parent.name for file in run.rglob("DONE"))
    assert stages == sorted(["convert", "curate", "moe", "export", "evaluate", "report"])
    settings = CheckpointReader(run / "moe" / "checkpoints").settings
    assert (settings["stage"], settings["l0_blocks"], settings["l0_block_threshold"]) == ("dsmoe", 4, 0.49)
    assert settings["l0_block_sparsity_coeff"] == 1.0
    config = json.loads((run / "export" / "config.json").read_text(encoding="utf-8"))
    assert (config["num_blocks"], config["num_dense_layers"]) == (4, toy.DENSE)
    numbers = summary(run)
    assert "experts" not in numbers
    assert "router" not in numbers
    assert set(numbers["perplexity"]) == {"dense", "dsmoe", "ratio"}
    assert set(numbers["perplexity"]["dsmoe"]["per_domain"]) == set(toy.TOPICS)
    assert numbers["perplexity"]["ratio"]["dsmoe"]["overall"] > 0
    assert numbers["parity"]["megatron_vs_hf_max_abs"] < 1e-4
    assert numbers["tokens"] == numbers["tokens"] | {"expert": 0, "moe": 2 * 256, "total": 2 * 256}
    blocks = numbers["blocks"]
    assert 1 <= blocks["mean_open"] <= 4
    gates = (toy.LAYERS - toy.DENSE) * 4 * toy.HIDDEN
    assert numbers["parameters"]["total"] == numbers["parameters"]["dense"] + gates
    one_block = (toy.LAYERS - toy.DENSE) * 3 * toy.HIDDEN * toy.FFN // 4
    active = numbers["parameters"]["dense_active"] + gates - (4 - blocks["mean_open"]) * one_block
    assert numbers["parameters"]["active"] == pytest.approx(active, abs=1)
    rows = [json.loads(row) for row in (run / "moe" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert {"active_fraction", "sparsity_loss"} <= set(rows[-1])
    page = (run / "report" / "report.html").read_text(encoding="utf-8")
    assert "DSMoE run" in page
    assert "Share of the tokens that open a block" in page
    assert "L0-MoE" not in page
    assert 'id="experts"' not in page


def test_mom(runs):
    run = runs / "mom"
    settings = CheckpointReader(run / "moe" / "checkpoints").settings
    assert (settings["stage"], settings["l0_masks"], settings["l0_masks_target"]) == ("mom", 4, 0.6)
    rows = [json.loads(row) for row in (run / "moe" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert rows[-1]["frozen"] is True
    config = json.loads((run / "export" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Ernie4_5_MoeForCausalLM"]
    numbers = summary(run)
    assert "experts" not in numbers
    assert set(numbers["perplexity"]) == {"dense", "mom", "ratio"}
    assert numbers["parity"]["megatron_vs_hf_max_abs"] < 1e-4
    assert numbers["tokens"] == numbers["tokens"] | {"expert": 0, "moe": 2 * 256}
    masks = numbers["masks"]
    width, shared = config["moe_intermediate_size"], config["moe_num_shared_experts"]
    assert masks["computed"] == (2 + shared) * width
    for units in masks["units"].values():
        assert units["shared"] + units["inactive"] <= toy.FFN
        assert len(units["routed"]) == 4
    assert set(masks["run"]["retention"]["layers"]) == {str(i) for i in range(toy.DENSE, toy.LAYERS)}
    upper = toy.LAYERS - toy.DENSE
    ffn = 3 * toy.HIDDEN * (toy.FFN - (2 + shared) * width)
    routers = 4 * toy.HIDDEN
    dense = numbers["parameters"]["dense_active"]
    assert numbers["parameters"]["active"] == dense + upper * (routers - ffn)
    assert len(numbers["router"]["mean_load"]["physics"]) == 4
    page = (run / "report" / "report.html").read_text(encoding="utf-8")
    assert "Mixture-of-Masks run" in page
    assert 'id="masks"' in page
    assert 'id="experts"' not in page
    assert "L0-MoE" not in page


@pytest.mark.parametrize("method", ["dsmoe", "mom"])
def test_a_second_command_does_nothing(runs, recipes, method):
    before = {file: file.stat().st_mtime_ns for file in (runs / method).rglob("DONE")}
    assert len(before) == 6
    done = toy.run(recipes[method], runs)
    assert done.returncode == 0, done.stderr
    assert {file: file.stat().st_mtime_ns for file in (runs / method).rglob("DONE")} == before
    assert done.stdout.count("done before") == 6

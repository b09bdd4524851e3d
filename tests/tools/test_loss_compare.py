"""Ten steps of both stages through Megatron's own loop in six layouts, by the program that users run.

The run folder (weights, data) is made once by the real chain on a toy model. Each stage is one call of the tool.
"""

import dataclasses
import json
import math
from pathlib import Path

import loss_compare as tool
import pytest
import yaml
from whole_chain import toy_world as toy

from megatron_l0moe.recipe.layout import Layout
from megatron_l0moe.recipe.recipe import load_recipe
from megatron_l0moe.runs.stages import Run
from megatron_l0moe.runtime.hardware import visible_gpus
from megatron_l0moe.sizes.architecture import Architecture

STEPS = 10
LAYOUTS = {
    # layers1+2 leaves the first pipeline rank the one dense layer: in the expert stage it trains nothing
    "expert": "dp2,distopt;tp2,sp;pp2,layers1+2",
    "moe": "ep2;tp2,sp,ep2,etp1,dp2;pp2,layers1+2,ep2",
}
CONTROLS = {"expert": {"l0-noise-seed": 7}, "moe": {"moe-aux-loss-coeff": 0.02}}
"""A small change of what is computed, in one process: other noise of the gates, twice the balance loss."""
ONE = tool.Series("one", 1, "", 0.0, [3.0, 2.0], [1.0, 0.5])


def run_of(world: Path) -> Run:
    return Run(
        recipe=load_recipe(world / "toy.yaml"), recipe_file=world / "toy.yaml", runs_dir=world / "runs"
    )


def arguments(world: Path, layouts: str, stage: str, *more: str) -> list[str]:
    where = ["--recipe", str(world / "toy.yaml"), "--runs-dir", str(world / "runs")]
    return [*where, "--layouts", layouts, "--stage", stage, "--steps", str(STEPS), *more]


def write_world(folder: Path) -> Path:
    """Write the toy model, corpus and a recipe whose batches can be shared by two data-parallel ranks."""
    file = toy.make_world(folder)
    recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    recipe["data"] |= {"tokens_per_expert": STEPS * 4 * 32, "tokens_per_set": STEPS // 2 * 4 * 32}
    recipe["expert_training"] |= {"micro_batch_size": 1, "global_batch_size": 4}
    recipe["moe_training"]["micro_batch_size"] = 1
    recipe["model"]["num_experts"] = 4  # with the toy's 2, top-2 would send every token to every expert
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, and the run folder up to `assemble`."""
    folder = write_world(tmp_path_factory.mktemp("world") / "toy")
    done = toy.run(folder / "toy.yaml", folder / "runs", "--until", "assemble")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def cold_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a run folder."""
    return write_world(tmp_path_factory.mktemp("cold") / "toy")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(0 < visible_gpus() < 4, reason="one GPU for each of 4 processes, or none at all")
@pytest.mark.parametrize("stage", ["expert", "moe"])
def test_layouts_equal_one_process(world: Path, stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = tool.main(arguments(world, LAYOUTS[stage], stage))
    printed = capsys.readouterr().out
    print(printed)
    assert code == 0, printed
    out = world / "runs" / "toy" / "loss_compare" / stage
    found = json.loads((out / "loss_compare.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in found["series"]] == ["one", *LAYOUTS[stage].split(";")]
    assert all(len(one["losses"]) == len(one["grad_norms"]) == STEPS for one in found["series"])
    assert all(verdict["is_equal"] for verdict in found["verdicts"])
    assert len(set(found["series"][0]["losses"])) == STEPS, "nothing was trained"
    page = (out / "loss_compare.md").read_text(encoding="utf-8")
    assert page.count("| equal |") == len(LAYOUTS[stage].split(";"))
    assert "--bf16" not in found["series"][0]["command"]

    run = run_of(world)
    architecture = Architecture.from_hf(Path(run.recipe.model.path))
    control = tool.train(run, stage, architecture, Layout(), STEPS, out, CONTROLS[stage], "control")
    one = tool.Series(**found["series"][0])
    verdict = tool.judge(one, control, tool.LOSS_TOLERANCE, tool.GRAD_NORM_TOLERANCE)
    print(verdict)
    assert not verdict.is_equal, "a changed computation passed for another layout"
    assert verdict.loss > tool.LOSS_TOLERANCE


def test_judge_by_hand() -> None:
    other = dataclasses.replace(ONE, name="x", losses=[3.0, 2.5], grad_norms=[1.25, 0.5])
    verdict = tool.judge(ONE, other, 0.5, 0.25)
    assert (verdict.loss, verdict.grad_norm, verdict.is_equal) == (0.5, 0.25, True)
    assert not tool.judge(ONE, other, 0.4, 0.25).is_equal
    assert not tool.judge(ONE, other, 0.5, 0.2).is_equal


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_different(number: float) -> None:
    for place in (0, 1):
        losses = [3.0, 2.0]
        losses[place] = number
        assert not tool.judge(ONE, dataclasses.replace(ONE, losses=losses), 1e9, 1e9).is_equal


def test_exit_code_of_a_difference(monkeypatch: pytest.MonkeyPatch, world_without_jobs: Path) -> None:
    assert tool.main(arguments(world_without_jobs, "dp2", "expert")) == 0
    monkeypatch.setattr(tool, "train", _fake_training(shift=1e-3))
    assert tool.main(arguments(world_without_jobs, "dp2", "expert")) == 1


@pytest.fixture
def world_without_jobs(cold_world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is started: made-up numbers, the same in all layouts."""
    monkeypatch.setattr(tool, "train", _fake_training(shift=0.0))
    monkeypatch.setattr(tool, "is_done", lambda stage: True)
    return cold_world


def _fake_training(shift: float):
    def train(run, stage, architecture, layout, steps, out):
        losses = [5.0 - i + (shift if layout.processes > 1 else 0.0) for i in range(steps)]
        return tool.Series(layout.text, layout.processes, "", 0.0, losses, [1.0] * steps)

    return train


@pytest.mark.parametrize(
    ("layouts", "stage", "more", "message"),
    [
        ("tp2,sp;xp2", "moe", [], "The layout 'xp2' has the word 'xp2'"),
        (
            "ep3",
            "moe",
            [],
            "Layout 'ep3': model.num_experts (4) must be divisible by ep (3); the nearest layout",
        ),
        ("ep2", "expert", [], "Layout 'ep2': ep (2) must be 1, since this stage trains a dense model"),
        ("tp2", "moe", [], "Layout 'tp2': tp (2) with model.num_experts (4) needs sp"),
        ("pp2", "moe", [], "Layout 'pp2': pp (2) must divide the model's 3 layers, or layersA+B must say"),
        ("pp2,vp2,batched-p2p", "moe", [], "Layout 'pp2,vp2,batched-p2p': vp (2) on pp (2) needs overlapped"),
        (
            "dp3",
            "moe",
            [],
            "sequences_per_domain * num_experts (4) must be divisible by micro_batch_size * data-parallel",
        ),
        ("cp2", "expert", [], "Layout 'cp2': cp (2) must be 1 without a GPU"),
        ("dp2", "expert", ["--steps", "11"], "--steps (11) must lie between 3 and the 10 steps for which"),
    ],
)
def test_bad_input(
    world_without_jobs: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    layouts: str,
    stage: str,
    more: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(tool, "visible_gpus", lambda: 0)
    assert tool.main(arguments(world_without_jobs, layouts, stage, *more)) == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: ")
    assert message in said
    assert said.count("\n") == 1


def test_more_ranks_than_gpus(
    world_without_jobs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "visible_gpus", lambda: 1)
    assert tool.main(arguments(world_without_jobs, "dp2", "expert")) == 2
    assert "the number of processes (2) must be at most the 1 GPUs of this machine" in capsys.readouterr().err


@pytest.mark.parametrize(("stage", "needed"), [("expert", "convert"), ("moe", "assemble")])
def test_a_missing_stage_is_named(
    cold_world: Path, capsys: pytest.CaptureFixture[str], stage: str, needed: str
) -> None:
    assert tool.main(arguments(cold_world, "dp2", stage)) == 2
    assert f"--until {needed}` first" in capsys.readouterr().err

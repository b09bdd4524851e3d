"""The chains of the methods beside L0-MoE: stages, jobs, dry run, batch scripts, and what is refused."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from toy_recipe import CONFIG, make_run, of_method, toy_architecture, write_model

from megatron_l0moe.chain import preflight, training_commands
from megatron_l0moe.chain.dry_run import describe
from megatron_l0moe.chain.slurm import sbatch
from megatron_l0moe.chain.slurm.cluster import load_cluster
from megatron_l0moe.chain.slurm.status import rows
from megatron_l0moe.chain.slurm.submit import RunJobs
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.plan import plan
from megatron_l0moe.runs.stages import (
    CHAIN,
    STAGE_NAMES,
    Run,
    chain,
    config_hash,
    place_of,
    selection,
    spec_of,
)
from megatron_l0moe.sizes.gpu_models import find_gpu

METHODS = ["dsmoe", "mom"]
CLUSTERS = Path(__file__).parents[2] / "slurm" / "clusters"
# of the toy recipe, before there was a key `method`
OLD_HASHES = {
    "convert": "fb2dd16fb24342b4",
    "curate": "432db078fdb5dde5",
    "experts": "7275bf481a2620e6",
    "assemble": "d0d1c2b2c4d257ad",
    "moe": "73699a9c89dfcfd0",
    "export": "56eb655ef2b4b6d6",
    "evaluate": "7930ed1d13435428",
    "report": "9df4d2de704e3ca2",
}


def run_with_model(folder: Path, method: str, **changes: Any) -> Run:
    write_model(folder / "model")
    (folder / "corpus").mkdir(exist_ok=True)
    paths = {"model__path": str(folder / "model"), "data__corpus": str(folder / "corpus")}
    return make_run(folder, **of_method(method, **paths, **changes))


def test_hashes_of_l0moe_are_those_from_before(tmp_path):
    recipe = make_run(tmp_path).recipe
    assert {name: config_hash(name, recipe) for name in STAGE_NAMES} == OLD_HASHES
    assert recipe.method == "l0moe"
    assert chain("l0moe") == CHAIN


@pytest.mark.parametrize(
    ("changes", "first"),
    [({"data__set_passes": 2}, "curate"), ({"moe_training__router_init": "normal"}, "assemble")],
)
def test_where_a_later_key_changes_the_chain(tmp_path, changes, first):
    recipe = make_run(tmp_path, **changes).recipe
    changed = {name for name in STAGE_NAMES if config_hash(name, recipe) != OLD_HASHES[name]}
    assert changed == set(STAGE_NAMES[STAGE_NAMES.index(first) :])


@pytest.mark.parametrize("method", METHODS)
def test_stages(tmp_path, method):
    recipe = make_run(tmp_path, **of_method(method)).recipe
    rows = chain(recipe.method)
    names = [spec.name for spec in rows]
    assert names == ["convert", "curate", "moe", "export", "evaluate", "report"]
    assert spec_of("moe", method).inputs == ("convert", "curate")
    for position, spec in enumerate(rows):
        assert set(spec.inputs) <= set(names[:position])
    assert [spec.name for spec in selection(method, "curate", "export")] == ["curate", "moe", "export"]
    with pytest.raises(
        L0MoEError, match=rf"no stage 'experts' of method {method}.* convert, curate, moe, exp"
    ):
        selection(method, "experts", None)
    # the data serve runs of all methods; what is trained on them is each method's own
    for name in ("convert", "curate"):
        assert config_hash(name, recipe) == OLD_HASHES[name]
    assert config_hash("moe", recipe) != OLD_HASHES["moe"]


@pytest.mark.parametrize(
    ("method", "changes", "after"),
    [
        ("dsmoe", {"dsmoe__blocks": 4}, {"moe", "export", "evaluate", "report"}),
        ("dsmoe", {"moe_training__learning_rate": 0.5}, {"moe", "export", "evaluate", "report"}),
        ("dsmoe", {"evaluation__repeats": 9}, {"evaluate", "report"}),
        ("mom", {"mom__target": 0.4}, {"moe", "export", "evaluate", "report"}),
    ],
)
def test_what_a_change_invalidates(tmp_path, method, changes, after):
    before = make_run(tmp_path, **of_method(method)).recipe
    changed = make_run(tmp_path, **of_method(method, **changes)).recipe
    names = [spec.name for spec in chain(method)]
    assert {name for name in names if config_hash(name, before) != config_hash(name, changed)} == after


def test_blocks_have_to_divide_the_ffn(tmp_path):
    run = run_with_model(tmp_path, "dsmoe", dsmoe__blocks=7)
    with pytest.raises(
        L0MoEError, match=r"dsmoe\.blocks \(7\) must divide .* 64, .* nearest that does is 8\.$"
    ):
        preflight.check(run.recipe)
    preflight.check(run_with_model(tmp_path, "dsmoe").recipe)


def test_dsmoe_jobs(tmp_path):
    run = make_run(tmp_path, **of_method("dsmoe", dsmoe={"blocks": 4, "threshold": 0.25}, seed=7))
    words = training_commands.moe_job(run, toy_architecture()).command
    flags = dict(itertools.pairwise(words))
    assert flags["--l0-stage"] == "dsmoe"
    assert flags["--pretrained-checkpoint"] == str(run.stage_folder("convert") / "megatron")
    assert flags["--l0-data-index"] == str(run.stage_folder("curate") / "moe")
    assert (flags["--l0-blocks"], flags["--l0-block-threshold"], flags["--l0-block-seed"]) == (
        "4",
        "0.25",
        "7",
    )
    assert flags["--l0-block-sparsity-coeff"] == "1.0"
    assert not {"--num-experts", "--moe-router-topk", "--l0-expert-ffn", "--moe-layer-freq"} & set(words)
    logits = training_commands.logits_job(run, toy_architecture()).command
    assert logits[logits.index("--l0-blocks") + 1] == "4"
    assert "--num-experts" not in logits
    owned = make_run(tmp_path, **of_method("dsmoe", moe_training={"flags": {"l0-blocks": 2}}))
    with pytest.raises(L0MoEError, match=r"moe_training\.flags may not set 'l0-blocks'"):
        training_commands.moe_job(owned, toy_architecture())


def test_mom_jobs(tmp_path):
    run = make_run(tmp_path, **of_method("mom", mom={"masks": 6, "target": 0.4}, seed=7))
    words = training_commands.moe_job(run, toy_architecture()).command
    flags = dict(itertools.pairwise(words))
    assert flags["--l0-stage"] == "mom"
    assert flags["--pretrained-checkpoint"] == str(run.stage_folder("convert") / "megatron")
    assert (flags["--l0-masks"], flags["--l0-masks-top-k"], flags["--l0-masks-target"]) == ("6", "2", "0.4")
    assert (flags["--l0-masks-seed"], flags["--l0-noise-seed"], flags["--l0-mask-lr"]) == ("7", "7", "0.3")
    assert not {"--num-experts", "--l0-expert-ffn", "--l0-blocks"} & set(words)
    owned = make_run(tmp_path, **of_method("mom", moe_training={"flags": {"l0-masks": 2}}))
    with pytest.raises(L0MoEError, match=r"moe_training\.flags may not set 'l0-masks'"):
        training_commands.moe_job(owned, toy_architecture())


def test_mom_needs_a_base_without_biases(tmp_path):
    run = run_with_model(tmp_path, "mom")
    preflight.check(run.recipe)
    config = CONFIG | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(L0MoEError, match=r"method mom exports as Ernie4\.5-MoE, which has no biases"):
        preflight.check(run.recipe)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("dsmoe", ["1 dense + 3 layers of 8 blocks of width 8 ", "768 of them gates"]),
        ("mom", ["1 dense + 3 layers of 8 masks over the FFN of 64, 2 for each token", "keep 50% of it"]),
    ],
)
def test_dry_run(tmp_path, method, words):
    run = run_with_model(tmp_path, method)
    text = "\n".join(describe(run, chain(method)))
    assert all(part in text for part in words)
    assert "experts" not in text
    assert "assemble" not in text
    assert [line[0] for line in text.splitlines() if line[1:3] == ". "] == list("123456")


@pytest.mark.parametrize("method", METHODS)
def test_plan_counts_l0moe_only(tmp_path, method):
    with pytest.raises(
        L0MoEError, match=rf"l0moe plan counts recipes of method l0moe only, and method is {method}"
    ):
        plan.make_plan(run_with_model(tmp_path, method).recipe, gpu=find_gpu("h100"))


@pytest.mark.parametrize("method", METHODS)
def test_batch_jobs(tmp_path, method, caplog):
    run, cluster = run_with_model(tmp_path, method), load_cluster(CLUSTERS / "plain.yaml")
    preflight.check_cluster(run.recipe, cluster, chain(method))
    for spec in chain(method):
        text = sbatch.render(run, toy_architecture(), cluster, spec.name, place_of(run))
        assert "assemble" not in text
        assert "experts" not in text
    text = sbatch.render(run, toy_architecture(), cluster, "moe", place_of(run))
    assert f"--l0-stage {method}" in text
    assert "It needs the results of convert, curate." in text
    preflight.check_memory(run.recipe, cluster, chain(method))
    assert f"Memory was not checked: there is no formula for method {method}" in caplog.text
    lines = rows(run, RunJobs(), {})
    assert [line.stage for line in lines] == [spec.name for spec in chain(method)]

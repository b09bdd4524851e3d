"""Experts made without training: recipe keys, stage hashes, the job's command, the plan of a dry run."""

from pathlib import Path

import pytest
from launch.test_jobs import check_golden, golden_run, value
from toy_recipe import make_run, toy_architecture, write_model

from megatron_l0moe.chain import dry_run
from megatron_l0moe.chain.stages import config_hash, selection
from megatron_l0moe.chain.training_commands import construct_job
from megatron_l0moe.errors import L0MoEError

# of the toy recipe, before there was a choice of methods
HASHES = {"experts": "7275bf481a2620e6", "report": "9df4d2de704e3ca2"}


def hashes(folder: Path, **changes):
    recipe = make_run(folder, **changes).recipe
    return {name: config_hash(name, recipe) for name in HASHES}


def test_the_default_leaves_every_hash_as_it_was(tmp_path):
    assert hashes(tmp_path) == HASHES
    assert hashes(tmp_path, expert_training__method="l0") == HASHES
    assert hashes(tmp_path, expert_training__calibration={"tokens": 64, "damping": 0.5}) == HASHES
    changed = hashes(tmp_path, expert_training__method="random")  # control
    assert not set(changed.values()) & set(HASHES.values())


def test_what_a_method_depends_on(tmp_path):
    def experts(method, **changes):
        return hashes(tmp_path, expert_training__method=method, **changes)["experts"]

    assert experts("random") != experts("magnitude")
    assert experts("magnitude") != experts("magnitude", expert_training__calibration={"tokens": 64})
    assert experts("magnitude") == experts("magnitude", expert_training__parallel={"processes": 2})


def test_construct_job(tmp_path):
    run = golden_run(
        tmp_path,
        expert_training={
            "global_batch_size": 2,
            "method": "magnitude",
            "calibration": {"tokens": 100},
            "flags": {"bf16": True},
            "parallel": {"processes": 4, "tensor": 2, "distributed_optimizer": True},
        },
    )
    check_golden("construct_job.txt", construct_job(run, toy_architecture(), 3, python="python"))


@pytest.mark.parametrize(("tokens", "sequences"), [(1, 1), (63, 1), (64, 2), (640, 20), (10**9, 20)])
def test_calibration_takes_whole_sequences_and_no_more_than_there_are(tmp_path, tokens, sequences):
    run = make_run(
        tmp_path, expert_training__method="random", expert_training__calibration={"tokens": tokens}
    )
    job = construct_job(run, toy_architecture(), 0)
    assert value(job, "--l0-calibration-sequences") == str(sequences)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "wanda"}, "expert_training.method"),
        ({"method": "random", "train_weights": False}, "train_weights false is a way of method l0"),
        (
            {"method": "random", "parallel": {"processes": 2, "pipeline": 2, "virtual_pipeline": 2}},
            "remove parallel.virtual_pipeline",
        ),
        ({"method": "random", "calibration": {"tokens": 0}}, "calibration.tokens"),
        ({"method": "random", "calibration": {"damping": 0.0}}, "calibration.damping"),
        ({"method": "random", "calibration": {"shared": 1.5}}, "calibration.shared"),
    ],
)
def test_bad_keys_are_refused(tmp_path, changes, message):
    with pytest.raises(L0MoEError, match=message):
        make_run(tmp_path, expert_training={"global_batch_size": 2} | changes)


def test_a_dry_run_shows_the_method_and_its_job(tmp_path):
    model = write_model(tmp_path / "model")
    for method, program in (("l0", "training.pretrain"), ("magnitude", "training.construct")):
        run = make_run(tmp_path, model__path=str(model), expert_training__method=method)
        text = "\n".join(dry_run.describe(run, selection("l0moe", "experts", "experts")))
        assert f"-m megatron_l0moe.{program} " in text
        assert ("magnitude, nothing is trained; 20 sequences of 32 tokens" in text) is (method != "l0")

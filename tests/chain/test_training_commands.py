"""The commands of the training jobs, word by word. After a wanted change: L0MOE_UPDATE_GOLDEN=1 pytest FILE.

Experts made without training: recipe keys, stage hashes, the job's command, the plan of a dry run.

Every flag of a rendered job is one that Megatron's parser, with ours added, knows.
"""

import argparse
import dataclasses
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
from toy_recipe import make_run, toy_architecture, write_model

from megatron_l0moe.chain import dry_run, training_commands
from megatron_l0moe.chain import training_commands as jobs
from megatron_l0moe.chain.training_commands import DenseTraining, construct_job, dense_job
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.layout import parse_layout
from megatron_l0moe.runs.stages import Run, config_hash, selection

GOLDEN = Path(__file__).parent.parent / "golden"
LAYOUT = {"processes": 8, "nodes": 2, "tensor": 2, "pipeline": 2, "expert": 2, "threads": 3}


def golden_run(tmp_path: Path, **changes: Any) -> Run:
    run = make_run(tmp_path, **changes)
    return Run(recipe=run.recipe, recipe_file=Path("recipe.yaml"), runs_dir=Path("runs"))


def one_flag_a_line(job: jobs.TrainingCommand) -> str:
    lines = [f"{name}={value}" for name, value in job.env.items()]
    for word in job.command:
        if word.startswith("-") or not lines[-1].startswith("-") or " " in lines[-1]:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return "\n".join(lines) + "\n"


def test_expert_job(tmp_path: Path) -> None:
    check_golden(
        "expert_job.txt",
        jobs.expert_job(golden_run(tmp_path), toy_architecture(), 3, python="python"),
    )


def test_moe_job_in_a_layout(tmp_path: Path) -> None:
    run = golden_run(
        tmp_path,
        moe_training={
            "parallel": LAYOUT,
            "router_learning_rate": 3e-3,
            "sequences_per_domain": 2,
            "flags": {"bf16": True, "lr-warmup-iters": 2},
        },
        data__tokens_per_set=2560,
    )
    check_golden("moe_job.txt", jobs.moe_job(run, toy_architecture(), python="python"))


def test_logits_job(tmp_path: Path) -> None:
    check_golden(
        "logits_job.txt",
        jobs.logits_job(golden_run(tmp_path), toy_architecture(), python="python"),
    )


def check_golden(name: str, job: jobs.TrainingCommand) -> None:
    path, text = GOLDEN / name, one_flag_a_line(job)
    if os.environ.get("L0MOE_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def value(job: jobs.TrainingCommand, flag: str) -> str:
    return job.command[job.command.index(flag) + 1]


def test_schedule_by_hand(tmp_path: Path) -> None:
    job = jobs.expert_job(make_run(tmp_path), toy_architecture(), 0)
    assert value(job, "--train-iters") == "10"
    assert value(job, "--lr-wsd-decay-iters") == "1"  # 10 %
    assert value(job, "--lr-warmup-iters") == "2"  # 20 %
    moe = jobs.moe_job(make_run(tmp_path), toy_architecture())
    assert value(moe, "--train-iters") == "20"
    assert value(moe, "--lr-wsd-decay-iters") == "2"
    assert value(moe, "--lr-warmup-iters") == "1"  # 6 % of 20 is 1.2


def test_one_step_has_no_warmup(tmp_path: Path) -> None:
    job = jobs.expert_job(make_run(tmp_path, data__tokens_per_expert=64), toy_architecture(), 0)
    assert value(job, "--train-iters") == "1"
    assert value(job, "--lr-warmup-iters") == "0"


def test_layer_pattern(tmp_path: Path) -> None:
    pattern = value(jobs.moe_job(make_run(tmp_path), toy_architecture()), "--moe-layer-freq")
    assert eval(pattern) == [0, 1, 1, 1]


def test_recipe_flags_replace_defaults(tmp_path: Path) -> None:
    run = make_run(tmp_path, expert_training__flags={"weight-decay": 0.0, "bf16": True})
    job = jobs.expert_job(run, toy_architecture(), 0)
    assert job.command.count("--weight-decay") == 1
    assert value(job, "--weight-decay") == "0.0"
    assert "--bf16" in job.command


@pytest.mark.parametrize("name", ["save", "num-experts", "hidden-size", "swiglu"])
def test_owned_flags_are_refused(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path, moe_training__flags={name: 1})
    with pytest.raises(L0MoEError, match=rf"moe_training\.flags may not set '{name}'"):
        jobs.moe_job(run, toy_architecture())


def test_sequence_parallel_goes_with_tensor_parallel(tmp_path: Path) -> None:
    run = make_run(tmp_path, moe_training__parallel={"processes": 2, "tensor": 2})
    assert "--sequence-parallel" in jobs.moe_job(run, toy_architecture()).command
    assert "--sequence-parallel" not in jobs.expert_job(run, toy_architecture(), 0).command


def test_flags_of_a_layout(tmp_path: Path) -> None:
    layout = {"processes": 8, "tensor": 2, "pipeline": 2, "expert": 4, "expert_tensor": 1}
    more = {"virtual_pipeline": 2, "distributed_optimizer": True, "dispatcher": "alltoall"}
    run = make_run(tmp_path, moe_training__parallel={**layout, **more})
    job = jobs.moe_job(run, toy_architecture())
    assert value(job, "--expert-tensor-parallel-size") == "1"
    assert value(job, "--num-virtual-stages-per-pipeline-rank") == "2"
    assert value(job, "--moe-token-dispatcher-type") == "alltoall"
    assert {"--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"} <= set(job.command)
    assert "--no-overlap-p2p-communication" not in job.command


def test_an_uneven_split_becomes_megatrons_text(tmp_path: Path) -> None:
    layout = {"processes": 2, "pipeline": 2, "pipeline_layers": [1, 3]}
    job = jobs.moe_job(make_run(tmp_path, moe_training__parallel=layout), toy_architecture())
    assert value(job, "--pipeline-model-parallel-layout") == "Et|tttL"


@pytest.mark.parametrize(
    "name", ["sequence-parallel", "expert-tensor-parallel-size", "context-parallel-size"]
)
def test_layout_flags_belong_to_parallel(tmp_path: Path, name: str) -> None:
    with pytest.raises(L0MoEError, match=rf"may not set '{name}'"):
        jobs.moe_job(make_run(tmp_path, moe_training__flags={name: 2}), toy_architecture())


def test_a_trial_saves_nothing_and_keeps_the_rest(tmp_path: Path) -> None:
    """The words of a trial are those of the job but for layout, length, precision and what is written."""
    flags = {"bf16": True, "lr-warmup-iters": 9, "weight-decay": 0.0}
    run = make_run(tmp_path, moe_training__flags=flags)
    layout = parse_layout("tp2,sp,ep2,etp1")
    trial = jobs.Trial(layout=layout, steps=5, folder=tmp_path / "t", flags={"lr": 0.5})
    job = jobs.moe_job(run, toy_architecture(), trial=trial)
    assert not {"--save", "--load", "--save-interval", "--bf16"} & set(job.command)
    assert value(job, "--pretrained-checkpoint") == str(run.stage_folder("assemble") / "megatron")
    assert value(job, "--l0-metrics-file") == str(tmp_path / "t" / "metrics.jsonl")
    assert (value(job, "--train-iters"), value(job, "--nproc-per-node")) == ("5", "2")
    assert (value(job, "--lr-warmup-iters"), value(job, "--lr")) == ("1", "0.5")
    assert value(job, "--weight-decay") == "0.0"
    whole = jobs.moe_job(run, toy_architecture())
    changed = {"--sequence-parallel", "--expert-model-parallel-size", "--expert-tensor-parallel-size"}
    left_out = {"--save", "--load", "--save-interval", "--bf16"}
    names = [{word for word in job.command if word.startswith("--")} for job in (job, whole)]
    assert names[0] - names[1] == changed
    assert names[1] - names[0] == left_out


def test_masks_only_is_a_key_of_the_recipe_and_no_flag(tmp_path: Path) -> None:
    run = golden_run(tmp_path, expert_training__train_weights=False)
    command = jobs.expert_job(run, toy_architecture(), 0, python="python").command
    assert command[command.index("--l0-train-weights") + 1] == "off"
    run = golden_run(tmp_path, expert_training__flags={"l0-train-weights": "off"})
    with pytest.raises(L0MoEError, match="may not set 'l0-train-weights'"):
        jobs.expert_job(run, toy_architecture(), 0, python="python")


def test_experts_do_not_share_a_tensorboard_folder(tmp_path: Path) -> None:
    flags = {"tensorboard-dir": "boards/x", "wandb-project": "p", "wandb-exp-name": "x", "bf16": True}
    run = make_run(tmp_path, expert_training__flags=flags, moe_training__flags=flags)
    expert, moe = (
        jobs.expert_job(run, toy_architecture(), 3),
        jobs.moe_job(run, toy_architecture()),
    )
    assert value(expert, "--tensorboard-dir") == "boards/x/expert_003"
    assert value(expert, "--wandb-exp-name") == "x-expert_003"
    assert value(expert, "--wandb-project") == "p"
    assert value(moe, "--tensorboard-dir") == "boards/x"
    assert value(moe, "--wandb-exp-name") == "x"


def test_dense_job(tmp_path: Path) -> None:
    training = DenseTraining(
        folder=Path("runs/base"),
        index=Path("runs/tokens/stream"),
        start=None,
        steps=100,
        seq_length=128,
        micro_batch_size=2,
        global_batch_size=8,
        learning_rate=1e-3,
        warmup_share=0.02,
        seed=7,
        save_interval=50,
        flags={"bf16": True, "lr-wsd-decay-iters": 30},
    )
    job = dense_job(training, toy_architecture(), python="python")
    check_golden("dense_job.txt", job)
    assert "--pretrained-checkpoint" not in job.command
    start = dataclasses.replace(training, start=Path("converted"))
    assert value(dense_job(start, toy_architecture()), "--pretrained-checkpoint") == "converted"


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


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Return all option strings of the training job's parser."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_l0moe.training.arguments import add_l0_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_l0_arguments(add_megatron_arguments(parser))
    return {option for action in parser._actions for option in action.option_strings}


@pytest.mark.parametrize("stage", ["expert", "moe"])
def test_flags_are_known(tmp_path: Path, known: set[str], stage: str) -> None:
    run = make_run(tmp_path, moe_training__parallel={"processes": 4, "tensor": 2, "expert": 2})
    job = (
        training_commands.expert_job(run, toy_architecture(), 0)
        if stage == "expert"
        else training_commands.moe_job(run, toy_architecture())
    )
    words = job.command[job.command.index(training_commands.PRETRAIN) + 1 :]
    assert {word for word in words if word.startswith("--")} - known == set()


def test_wrong_flags_would_be_seen(known: set[str]) -> None:
    assert "--no-such-flag" not in known
    assert "--l0-stage" in known

"""The commands of the training jobs, word by word. After a wanted change: L0MOE_UPDATE_GOLDEN=1 pytest FILE."""

import dataclasses
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
from toy_recipe import make_run, toy_architecture

from megatron_l0moe.chain import training_commands as jobs
from megatron_l0moe.chain.stages import Run
from megatron_l0moe.chain.training_commands import DenseTraining, dense_job
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.layout import parse_layout

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

"""Our flags beside Megatron's: names, no clashes, round trip, and the rules that need both.

Layouts of torchrun commands written by hand: each is refused with one sentence, before any process group is made.
"""

import argparse
import os
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.layout import Layout
from megatron_l0moe.training import arguments


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return arguments.add_l0_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def ours() -> set[str]:
    return {field.name for _, config in arguments.ARGUMENT_GROUPS for field in fields(config)}


def test_every_flag_of_ours_starts_with_l0_and_clashes_with_none(parser):
    names = ours()
    assert all(name.startswith("l0_") for name in names)
    actions = [action for action in parser._actions if action.dest in names]
    assert {action.dest for action in actions} == names
    assert len(actions) == len(names), "a dest is shared with a flag of Megatron"
    for action in actions:
        assert all(option.startswith("--l0-") for option in action.option_strings)


def test_help_renders():
    own = arguments.add_l0_arguments(
        argparse.ArgumentParser()
    )  # Megatron's own help does not render in 0.19.2
    assert "--l0-retention-ramp" in own.format_help()


def parse(parser: argparse.ArgumentParser, *words: str) -> Any:
    args = parser.parse_args(list(words))
    args.num_layers, args.ffn_hidden_size, args.num_experts = 4, 64, None
    return args


def test_flags_reach_the_configs(parser):
    words = (
        "--l0-stage",
        "expert",
        "--l0-expert-ffn",
        "16",
        "--l0-temperature",
        "0.5",
        "--l0-dense-layers",
        "2",
    )
    settings = arguments.settings_from_args(parse(parser, *words))
    assert settings.plan.stage == "expert"
    assert settings.plan.dense_layers == 2
    assert settings.plan.retention.l0_expert_ffn == 16
    assert settings.plan.gate.l0_temperature == 0.5
    stored = arguments.settings_as_dict(settings)
    assert stored["stage"] == "expert"
    assert stored["l0_temperature"] == 0.5


MOM = ("--l0-stage", "mom", "--l0-retention-control", "lagrangian")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--l0-stage", "expert"), r"--l0-expert-ffn \(0\) must lie between 1 and --ffn-hidden-size \(64\)"),
        (("--l0-stage", "expert", "--l0-expert-ffn", "65"), r"--l0-expert-ffn \(65\) must lie between 1"),
        (("--l0-dense-layers", "5"), r"--l0-dense-layers \(5\) must be at most --num-layers \(4\)"),
        (("--l0-stage", "moe"), "--l0-stage moe needs --num-experts"),
        (("--l0-domain-load-interval", "-1"), "l0_domain_load_interval must be at least 0, got -1"),
        (("--l0-stretch-low", "0.1"), "l0_stretch_low must be below 0"),
        (("--l0-stage", "expert", "--l0-expert-ffn", "8", "--fp16"), "neither --fp16 nor"),
        (
            ("--l0-stage", "dsmoe", "--l0-blocks", "7"),
            r"--l0-blocks \(7\) must divide .* \(64\), .* nearest .* is 8",
        ),
        (("--l0-stage", "dsmoe", "--l0-blocks", "1"), "l0_blocks must be at least 2, got 1"),
        (("--l0-stage", "dsmoe", "--l0-dense-layers", "4"), r"\(4\) must be below --num-layers \(4\)"),
        (("--l0-stage", "dsmoe", "--calculate-per-token-loss"), "does not take --calculate-per-token-loss"),
        (
            ("--l0-stage", "expert", "--l0-expert-ffn", "8", "--l0-freeze-fraction", "0"),
            "--l0-freeze-fraction 0 needs --l0-retention-control lagrangian",
        ),
        ((*MOM, "--l0-dense-layers", "4"), r"\(4\) must be below --num-layers \(4\)"),
        ((*MOM, "--l0-masks-top-k", "1"), "l0_masks_top_k must be at least 2 and below"),
        ((*MOM, "--fp16"), "neither --fp16 nor"),
        ((*MOM, "--overlap-grad-reduce"), "--overlap-grad-reduce needs a gradient"),
        (("--l0-stage", "mom"), "--l0-stage mom takes --l0-retention-control lagrangian"),
        (
            (*MOM, "--l0-train-weights", "off"),
            "--l0-train-weights off is for the expert stage",
        ),
        ((*MOM, "--l0-freeze-fraction", "0"), "needs --l0-freeze-fraction above 0"),
        ((*MOM, "--l0-masks-target", "0.01"), "at least one channel of .*, that is 1 / 64"),
        ((*MOM, "--train-iters", "4"), "leaves no step between open gates and the freeze"),
    ],
)
def test_bad_flags_end_with_one_sentence(parser, words, message):
    with pytest.raises(L0MoEError, match=message) as caught:
        arguments.settings_from_args(parse(parser, *words))
    assert str(caught.value).count("\n") == 0


def test_blocks_are_cut_out_of_dense_layers_only(parser):
    args = parse(parser, "--l0-stage", "dsmoe")
    stored = arguments.settings_as_dict(arguments.settings_from_args(args))
    assert (stored["stage"], stored["l0_blocks"], stored["l0_block_threshold"]) == ("dsmoe", 8, 0.5)
    args.num_experts = 4
    with pytest.raises(L0MoEError, match=r"takes no --num-experts \(4\)"):
        arguments.settings_from_args(args)


def test_masks_are_laid_over_dense_layers_only(parser):
    args = parse(parser, *MOM, "--l0-masks", "6")
    stored = arguments.settings_as_dict(arguments.settings_from_args(args))
    names = ("stage", "l0_masks", "l0_masks_top_k", "l0_masks_target")
    assert [stored[name] for name in names] == ["mom", 6, 2, 0.5]
    args.num_experts = 4
    with pytest.raises(L0MoEError, match=r"takes no --num-experts \(4\)"):
        arguments.settings_from_args(args)


def test_masks_only_needs_a_freeze(parser):
    words = ("--l0-stage", "expert", "--l0-expert-ffn", "8", "--l0-train-weights", "off")
    assert arguments.settings_from_args(parse(parser, *words)).stage.l0_train_weights == "off"
    with pytest.raises(L0MoEError, match="--l0-train-weights off needs --l0-freeze-fraction above 0"):
        arguments.settings_from_args(parse(parser, *words, "--l0-freeze-fraction", "0"))


DENSE = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --seq-length 16 --max-position-embeddings 16 --micro-batch-size 1 --global-batch-size 4 "
    "--tokenizer-type NullTokenizer --vocab-size 64 --make-vocab-size-divisible-by 1"
)
MOE = f"{DENSE} --l0-stage moe --num-experts 4 --moe-ffn-hidden-size 6 --moe-router-topk 2"
TP2, PP2, EP2 = (f"--{kind}-model-parallel-size 2" for kind in ("tensor", "pipeline", "expert"))


def check(monkeypatch: pytest.MonkeyPatch, words: str, processes: int, *, has_gpu: bool = True) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain", *shlex.split(words)])
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(arguments, "has_cuda", lambda: has_gpu)
    arguments.check_command_line()


@pytest.mark.parametrize(
    ("words", "processes", "sentence"),
    [
        (
            f"{MOE} --expert-model-parallel-size 3",
            3,
            "--num-experts (4) must be divisible by --expert-model-parallel-size (3); the nearest layout that works is "
            "ep4 (4 processes).",
        ),
        (
            f"{DENSE} {EP2}",
            2,
            "--expert-model-parallel-size (2) must be 1, since this stage trains a dense model; the nearest layout "
            "that works is dp2 (2 processes).",
        ),
        (
            f"{MOE} --expert-tensor-parallel-size 4",
            4,
            "--moe-ffn-hidden-size (6) must be divisible by --expert-tensor-parallel-size (4); the nearest layout that "
            "works is dp4 (4 processes).",
        ),
        (
            f"{DENSE} --tensor-model-parallel-size 4",
            4,
            "--tensor-model-parallel-size (4) must divide the model's 2 KV heads; the nearest layout that works is "
            "tp2,dp2 (4 processes).",
        ),
        (
            f"{DENSE} {TP2} --vocab-size 63",
            2,
            "--tensor-model-parallel-size (2) must divide the vocabulary of 63 without padding, which here adds 1 "
            "random rows to the embedding's 63; the nearest layout that works is dp2 (2 processes).",
        ),
        (
            f"{MOE} {TP2}",
            2,
            "--tensor-model-parallel-size (2) with --num-experts (4) needs --sequence-parallel, since an MoE layer "
            "gives each tensor-parallel rank tokens of its own; the nearest layout that works is tp2,sp (2 processes).",
        ),
        (
            f"{DENSE} {PP2} --num-virtual-stages-per-pipeline-rank 2 --no-overlap-p2p-communication",
            2,
            "--num-virtual-stages-per-pipeline-rank (2) on --pipeline-model-parallel-size (2) needs overlapped "
            "pipeline messages, since in a batch the messages of the two neighbours, which are one rank, are "
            "exchanged; the nearest layout that works is pp2,vp2 (2 processes).",
        ),
        (
            f"{DENSE} --pipeline-model-parallel-size 3",
            3,
            "--pipeline-model-parallel-size (3) must divide the model's 4 layers, or --pipeline-model-parallel-layout "
            "must say how many each stage takes; the nearest layout that works is pp4 (4 processes).",
        ),
        (
            f"{DENSE} {TP2}",
            3,
            "WORLD_SIZE (3) must be divisible by tensor * pipeline * context (2 * 1 * 1 = 2) and by expert-tensor * "
            "expert * pipeline (2 * 1 * 1 = 2); the nearest layout that works is tp2,dp2 (4 processes).",
        ),
        (
            DENSE,
            3,
            "--global-batch-size (4) must be divisible by --micro-batch-size * data-parallel size (1 * 3 = 3); the "
            "nearest layout that works is dp4 (4 processes).",
        ),
    ],
)
def test_refused(monkeypatch: pytest.MonkeyPatch, words: str, processes: int, sentence: str) -> None:
    with pytest.raises(L0MoEError) as caught:
        check(monkeypatch, words, processes)
    assert str(caught.value) == sentence


def test_context_parallelism_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    words = f"{DENSE} --context-parallel-size 2"
    with pytest.raises(
        L0MoEError, match=r"--context-parallel-size \(2\) must be 1 without a GPU, .* is dp2 \(2 proc"
    ):
        check(monkeypatch, words, 2, has_gpu=False)
    check(monkeypatch, words, 2, has_gpu=True)


@pytest.mark.parametrize(
    ("words", "processes"),
    [
        (DENSE, 1),
        (f"{DENSE} {TP2}", 2),
        (f"{MOE} {TP2} {EP2} --sequence-parallel --expert-tensor-parallel-size 1", 4),
        (f"{MOE} {PP2} {EP2} --num-virtual-stages-per-pipeline-rank 2", 4),
        (f"{DENSE} {PP2} --pipeline-model-parallel-layout Et|tttL", 2),
        (f"{DENSE} --pipeline-model-parallel-size 3 --decoder-first-pipeline-num-layers 2", 3),
    ],
)
def test_accepted(monkeypatch: pytest.MonkeyPatch, words: str, processes: int) -> None:
    if processes == 3:
        words += " --global-batch-size 3"
    check(monkeypatch, words, processes)


def test_flags_become_a_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    words = f"{MOE} {TP2} {PP2} {EP2} --expert-tensor-parallel-size 1 --sequence-parallel --use-distributed-optimizer"
    monkeypatch.setattr(
        sys, "argv", ["pretrain", *shlex.split(words), "--num-layers-per-virtual-pipeline-stage", "1"]
    )
    monkeypatch.setenv("WORLD_SIZE", "8")
    args = arguments.parse_args(arguments.add_l0_arguments)
    assert arguments.layout_from_args(args) == Layout(
        processes=8,
        tensor=2,
        sequence=True,
        pipeline=2,
        virtual_pipeline=2,
        expert=2,
        expert_tensor=1,
        distributed_optimizer=True,
    )


@pytest.mark.slow
def test_the_program_refuses_before_it_meets_the_other_ranks() -> None:
    """One rank of three, alone: it would wait for the others in vain if it tried to make a process group."""
    words = f"{MOE} {TP2} --sequence-parallel"
    done = subprocess.run(
        [sys.executable, "-m", "megatron_l0moe.training.pretrain", *shlex.split(words)],
        capture_output=True,
        text=True,
        env={**os.environ, "WORLD_SIZE": "3", "RANK": "0", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        check=False,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert (
        "Error: WORLD_SIZE (3) must be divisible by tensor * pipeline * context (2 * 1 * 1 = 2)"
        in done.stderr
    )
    assert "Traceback" not in done.stderr

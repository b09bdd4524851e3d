"""Layouts of torchrun commands written by hand: each is refused with one sentence, before any process group is made."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.layout import Layout
from megatron_l0moe.training import arguments

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

"""A recipe against its model, before any work."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from toy_recipe import make_run, toy_architecture, write_model

from megatron_l0moe.chain import preflight
from megatron_l0moe.errors import L0MoEError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__dense_layers": 4},
            r"model\.dense_layers \(4\) must be smaller than the model's 4 layers; use at most 3",
        ),
        (
            {"model__expert_ffn": 65},
            r"model\.expert_ffn \(65\) must be at most the dense model's FFN width, 64",
        ),
        (
            {"data__seq_length": 128, "data__tokens_per_set": 5000},
            r"data\.seq_length \(128\) must be at most .* 64",
        ),
    ],
)
def test_sizes(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(L0MoEError, match=message):
        preflight.check_sizes(make_run(tmp_path, **changes).recipe, toy_architecture())


def test_a_window_is_a_limit_too(tmp_path: Path) -> None:
    recipe = make_run(tmp_path).recipe
    architecture = dataclasses.replace(toy_architecture(), family="mistral", sliding_window=32)
    preflight.check_sizes(recipe, architecture)
    with pytest.raises(L0MoEError, match=r"data\.seq_length \(32\) must be at most .*sliding window, 31\."):
        preflight.check_sizes(recipe, dataclasses.replace(architecture, sliding_window=31))


def test_every_family_has_a_layout_but_not_for_every_target(tmp_path: Path) -> None:
    llama = toy_architecture()
    qwen2 = dataclasses.replace(llama, family="qwen2", qkv_bias=True)
    for target in ("transformers", "vllm", "sglang", "all"):
        preflight.check_sizes(make_run(tmp_path, export__target=target).recipe, llama)
    for target in ("transformers", "vllm", "all"):
        preflight.check_sizes(make_run(tmp_path, export__target=target).recipe, qwen2)
    with pytest.raises(
        L0MoEError, match=r"export\.target 'sglang' writes a layout that transformers.*; use 'all'\."
    ):
        preflight.check_sizes(make_run(tmp_path, export__target="sglang").recipe, qwen2)
    unusual = dataclasses.replace(qwen2, head_dim=16)
    with pytest.raises(L0MoEError, match="cannot be exported for vllm"):
        preflight.check_sizes(make_run(tmp_path, export__target="vllm").recipe, unusual)


MOE, EXPERT = "moe_training.parallel", "expert_training.parallel"


@pytest.mark.parametrize(
    ("changes", "clause", "nearest"),
    [
        (
            {"moe_training__parallel": {"expert": 3, "processes": 3}},
            f"model.num_experts (4) must be divisible by {MOE}.expert (3)",
            "ep4 (4 processes)",
        ),
        (
            {"moe_training__parallel": {"expert_tensor": 3, "processes": 3}},
            f"model.expert_ffn (16) must be divisible by {MOE}.expert_tensor (3)",
            "dp4 (4 processes)",
        ),
        (
            {"moe_training__parallel": {"tensor": 4, "processes": 4}},
            f"{MOE}.tensor (4) must divide the model's 2 KV heads",
            "tp2,sp,dp2 (4 processes)",
        ),
        (
            {"moe_training__parallel": {"tensor": 2, "processes": 2, "sequence": False}},
            f"{MOE}.tensor (2) with model.num_experts (4) needs {MOE}.sequence",
            "tp2,sp (2 processes)",
        ),
        (
            {"expert_training__parallel": {"pipeline": 3, "processes": 3}},
            f"{EXPERT}.pipeline (3) must divide the model's 4 layers, or {EXPERT}.pipeline_layers must say how many",
            "pp4 (4 processes)",
        ),
        (
            {"expert_training__parallel": {"pipeline": 2, "processes": 2, "pipeline_layers": [1, 2]}},
            f"{EXPERT}.pipeline_layers (1+2) must be 2 numbers, one a stage, with the sum 4",
            "pp2 (2 processes)",
        ),
        (
            {
                "moe_training__parallel": {
                    "pipeline": 2,
                    "processes": 2,
                    "virtual_pipeline": 2,
                    "overlap_p2p": False,
                }
            },
            f"{MOE}.virtual_pipeline (2) on {MOE}.pipeline (2) needs overlapped pipeline messages",
            "pp2,vp2 (2 processes)",
        ),
        (
            {"moe_training__parallel": {"tensor": 2, "processes": 3}},
            f"{MOE}.processes (3) must be divisible by tensor * pipeline * context (2 * 1 * 1 = 2)",
            "tp2,sp,dp2 (4 processes)",
        ),
        (
            {"moe_training__parallel": {"processes": 3}},
            "moe_training.sequences_per_domain * num_experts (4) must be divisible by micro_batch_size * data-parallel "
            "size (1 * 3 = 3)",
            "dp4 (4 processes)",
        ),
    ],
)
def test_layouts(tmp_path: Path, changes: dict[str, Any], clause: str, nearest: str) -> None:
    """Some are refused when the recipe is read, some when the model is known; the sentence is the same."""
    with pytest.raises(L0MoEError) as caught:
        preflight.check_sizes(make_run(tmp_path, **changes).recipe, toy_architecture())
    assert clause in str(caught.value)
    assert str(caught.value).endswith(f"; the nearest layout that works is {nearest}.")


def test_vocabulary(tmp_path: Path) -> None:
    run = make_run(tmp_path, expert_training__parallel={"tensor": 2, "processes": 2})
    odd = dataclasses.replace(toy_architecture(), vocab_size=127)
    with pytest.raises(
        L0MoEError, match=r"must divide the vocabulary of 127 .* adds 1 random rows .* is dp2 \(2 pro"
    ):
        preflight.check_sizes(run.recipe, odd)


def test_context_parallelism_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_run(tmp_path, moe_training__parallel={"context": 2, "processes": 2}).recipe
    preflight.check_sizes(recipe, toy_architecture())  # a plan for another machine
    monkeypatch.setattr(preflight, "visible_gpus", lambda: 0)
    with pytest.raises(
        L0MoEError, match=r"parallel\.context \(2\) must be 1 without a GPU.* is dp2 \(2 processes\)"
    ):
        preflight.check_machine(recipe)
    monkeypatch.setattr(preflight, "visible_gpus", lambda: 2)
    preflight.check_machine(recipe)


def test_more_processes_than_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_run(tmp_path, moe_training__parallel={"processes": 4}).recipe
    monkeypatch.setattr(preflight, "visible_gpus", lambda: 2)
    with pytest.raises(
        L0MoEError, match=r"processes \(4\) must be at most the 2 GPUs of this machine, .* at most 2\."
    ):
        preflight.check_machine(recipe)
    preflight.check_machine(recipe, "expert_training")
    monkeypatch.setattr(preflight, "visible_gpus", lambda: 0)
    preflight.check_machine(recipe)  # the CPU takes any number


def test_good_recipe(tmp_path: Path) -> None:
    preflight.check_sizes(make_run(tmp_path).recipe, toy_architecture())


def test_missing_corpus(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    run = make_run(tmp_path, model__path=str(model), data__corpus=str(tmp_path / "none"))
    with pytest.raises(L0MoEError, match=r"data\.corpus: the folder .*none does not exist"):
        preflight.check(run.recipe)
    (tmp_path / "none").write_bytes(b"")  # a single file may be the corpus
    preflight.check(run.recipe)


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(L0MoEError, match=r"Model folder models/toy does not exist"):
        preflight.check(make_run(tmp_path).recipe)

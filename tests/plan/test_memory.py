"""FLOPs and memory formulas against real (tiny) Megatron models of both stages, and numbers worked by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from planning_cases import CASES, SIZES

from megatron_l0moe.plan.memory import Workload, chunks_in_flight, layer_bytes, peak_memory, rank_parameters
from megatron_l0moe.plan.plan import TABLE5
from megatron_l0moe.recipe.layout import Layout, parse_layout
from megatron_l0moe.sizes.architecture import Architecture
from megatron_l0moe.sizes.flops import (
    Recompute,
    StageModel,
    dense_model,
    layer_flops,
    stage_model,
    training_flops,
)

HERE = Path(__file__).parent
# Adam's counter, 4 bytes for each tensor, and nothing else: the model has 20 to 60 tensors of 2000 to 20000 bytes.
STEP_COUNTERS = 300
# Of a model with 64 channels: norms' scales, RoPE's tables, the indices of routed tokens.
SMALL_TENSORS = 0.05
ONE = Layout()


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Any]]:
    """All cases, in one process that pretends to be a training job."""
    done = subprocess.run(
        [sys.executable, str(HERE.parent / "planning_measure.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def model_of(name: str) -> StageModel:
    z = SIZES
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": z["hidden"],
        "intermediate_size": z["ffn"],
        "num_hidden_layers": z["layers"],
        "num_attention_heads": z["heads"],
        "vocab_size": z["vocab"],
        "tie_word_embeddings": CASES[name].get("tied", True),
    }
    return stage_model(
        Architecture.from_config(config, Path("config.json")),
        CASES[name]["stage"],
        dense_layers=z["dense"],
        num_experts=z["experts"],
        expert_ffn=z["expert_ffn"],
        top_k=z["top_k"],
        trains_weights=CASES[name].get("trains", "on") == "on",
    )


def recompute_of(name: str) -> Recompute:
    flags = CASES[name].get("recompute", {})
    return Recompute(
        granularity=flags.get("recompute_granularity", "none"),
        modules=tuple(flags.get("recompute_modules", ())),
    )


def workload_of(name: str) -> Workload:
    return Workload(
        seq_length=SIZES["sequence"],
        micro_batch=SIZES["batch"],
        global_batch=SIZES["batch"],
        bf16=CASES[name].get("bf16", False),
        recompute=recompute_of(name),
    )


@pytest.mark.parametrize("name", CASES)
def test_parameters_and_state(measured: dict[str, dict[str, Any]], name: str) -> None:
    model, found = model_of(name), measured[name]
    counts = rank_parameters(model, ONE, 0)
    assert (counts.total, counts.trained) == (found["parameters"], found["trained"])
    memory = peak_memory(model, ONE, workload_of(name))
    assert memory.weights == found["weights"]
    assert memory.gradients == found["gradients"]
    assert memory.optimizer == pytest.approx(found["optimizer"], abs=STEP_COUNTERS)


def test_state_of_another_model_differs(measured: dict[str, dict[str, Any]]) -> None:
    """The control: bf16 against fp32, masks only against weights, untied against tied."""
    for name, other in (("moe", "moe_bf16"), ("expert", "expert_masks_only"), ("moe", "moe_untied")):
        memory = peak_memory(model_of(other), ONE, workload_of(other))
        assert memory.optimizer != pytest.approx(measured[name]["optimizer"], abs=STEP_COUNTERS)


def test_counts_equal_the_exported_models() -> None:
    """One process holds the counts of the Hugging Face model, and the gates in the expert stage."""
    for row in TABLE5:
        for model, gates in ((row.dense(), row.dense().upper_layers), (row.moe(), 0)):
            counts = rank_parameters(model, ONE, 0)
            assert counts.total == model.counts.total + gates * model.architecture.ffn_hidden_size


@pytest.mark.parametrize("name", [name for name in CASES if name != "moe_bf16"])
def test_flops(measured: dict[str, dict[str, Any]], name: str) -> None:
    """Every product that torch counts. The CPU's attention computes all of s^2, of which a half is causal."""
    model, length = model_of(name), SIZES["sequence"]
    flops = training_flops(model, length, recompute_of(name))
    scores = _score_passes(name) * layer_flops(model, length, upper=True).scores
    tokens = SIZES["batch"] * length
    products = measured[name]["flops"]
    assert products["aten.mm"] == (flops.executed - scores) * tokens
    assert products["aten.bmm"] + products["aten.baddbmm"] == 2 * scores * tokens


def test_other_recomputation_has_other_flops(measured: dict[str, dict[str, Any]]) -> None:
    products = sum(measured["moe_full"]["flops"].values())
    for other in ("moe", "moe_recomputed"):
        assert sum(measured[other]["flops"].values()) < products
        flops = training_flops(model_of("moe_full"), SIZES["sequence"], recompute_of(other))
        assert (
            flops.executed
            < training_flops(model_of("moe_full"), SIZES["sequence"], recompute_of("moe_full")).executed
        )


@pytest.mark.parametrize("name", [name for name in CASES if "bf16" not in name])
def test_activations(measured: dict[str, dict[str, Any]], name: str) -> None:
    """What autograd keeps, after what only the CPU's kernels keep.

    In bf16 the CPU's experts are padded and its norms keep fp32 copies, which no GPU does.
    """
    memory = peak_memory(model_of(name), ONE, workload_of(name))
    expected = memory.activations + _only_on_a_cpu(name)
    assert measured[name]["activations"] == pytest.approx(expected, rel=SMALL_TENSORS, abs=12_000)


def test_activations_of_another_recomputation_differ(measured: dict[str, dict[str, Any]]) -> None:
    """The control."""
    for name, other in (
        ("moe", "moe_recomputed"),
        ("moe_recomputed", "moe_full"),
        ("expert", "expert_masks_only"),
    ):
        expected = peak_memory(model_of(other), ONE, workload_of(other)).activations + _only_on_a_cpu(other)
        assert measured[name]["activations"] != pytest.approx(expected, rel=SMALL_TENSORS, abs=12_000)


def _layers_with_gradient(name: str) -> int:
    """Layers whose attention has a backward pass."""
    z = SIZES
    if CASES[name]["stage"] == "moe" or recompute_of(name).redoes("mlp"):
        return z["layers"]
    return z["layers"] - z["dense"] - 1


def _score_passes(name: str) -> float:
    layers = SIZES["layers"]
    again = layers if recompute_of(name).full else 0
    return layers + again + 2 * _layers_with_gradient(name)


def _only_on_a_cpu(name: str) -> float:
    """Bytes: the loss' probabilities (a GPU has them too: in the working set); attention's; norms' normalised input."""
    z, is_moe = SIZES, CASES[name]["stage"] == "moe"
    tokens = z["batch"] * z["sequence"]
    hidden = tokens * z["hidden"] * 4
    loss = tokens * z["vocab"] * 4
    norms = hidden if is_moe else 0  # a norm with a trained weight, made of single products: the last one
    if recompute_of(name).full:
        return loss + norms
    layers = _layers_with_gradient(name)
    probabilities = z["batch"] * z["heads"] * z["sequence"] ** 2 * 4
    # Plain products do not keep their output; the frozen projection does not either.
    output = 0 if is_moe else hidden
    return loss + norms + layers * (probabilities - output + 2 * norms)


# By hand, Llama-3-8B: H 4096, q 4096, g 1024, F 14336, V 128256, 8 dense + 24 MoE layers, 64 experts of 1024, top 2.
LLAMA = TABLE5[0]


def test_flops_by_hand() -> None:
    attention = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    scores = 2 * 4096 * 4096  # s = 4096, causal
    dense, experts = 2 * 3 * 4096 * 14336, 2 * (2 * 3 * 4096 * 1024 + 64 * 4096)
    forward = 32 * (attention + scores) + 8 * dense + 24 * experts + 2 * 128256 * 4096
    flops = training_flops(LLAMA.moe(), 4096, Recompute(granularity="full"))
    assert flops.forward == forward
    assert flops.model == 3 * forward
    assert flops.recomputed == forward - 2 * 128256 * 4096


def test_flops_of_a_dense_model_by_hand() -> None:
    attention = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    forward = 32 * (attention + 2 * 4096 * 4096 + 2 * 3 * 4096 * 14336) + 2 * 128256 * 4096
    flops = training_flops(dense_model(LLAMA.moe().architecture), 4096, Recompute())
    assert (flops.forward, flops.model, flops.recomputed) == (forward, 3 * forward, 0)


def test_memory_by_hand() -> None:
    """tp4, ep8, etp1 on 64 GPUs, bf16 with the distributed optimizer, a micro-batch of 4096 tokens."""
    layout = parse_layout("tp4,sp,ep8,etp1,dp16,distopt")
    workload = Workload(
        seq_length=4096, micro_batch=1, global_batch=128, recompute=Recompute(granularity="full")
    )
    attention = (2 * 4096 * 4096 + 2 * 4096 * 1024) // 4
    dense = 32 * (attention + 2 * 4096) + 4096 + 8 * 3 * 4096 * 14336 // 4
    dense += 24 * 64 * 4096 + 2 * 128256 * 4096 // 4
    experts = 24 * 64 // 8 * 3 * 4096 * 1024
    memory = peak_memory(LLAMA.moe(), layout, workload)
    assert memory.weights == 2 * (dense + experts) + 4 * 24 * 2 * 64
    assert memory.gradients == 4 * (dense + experts)
    assert memory.optimizer == pytest.approx(12 * dense / 16 + 12 * experts / 8)
    boundary = 4096 * 4096 * 2 / 4
    assert memory.activations == (32 + 2) * boundary
    assert memory.working == 4096 * 128256 / 4 * 6


def test_layer_by_hand() -> None:
    """A dense layer of the moe stage: norms' inputs and outputs, q, k, their projection, scores' output, 3 F."""
    workload = Workload(seq_length=4096, micro_batch=1, global_batch=8)
    per_token = 4 * 4096 + (4096 + 1024) + (4096 + 2 * 1024) + 4096 + 3 * 14336
    assert layer_bytes(LLAMA.moe(), ONE, workload, upper=False) == 4096 * per_token * 2
    tp = parse_layout("tp4,sp")
    assert layer_bytes(LLAMA.moe(), tp, workload, upper=False) == 4096 * per_token * 2 / 4
    # without sequence parallelism the four hidden states are whole on every rank
    assert layer_bytes(LLAMA.moe(), parse_layout("tp4"), workload, upper=False) == 4096 * 2 * (
        4 * 4096 + (per_token - 4 * 4096) / 4
    )


@pytest.mark.parametrize(
    ("layout", "rank", "chunks"),
    [("pp4,dp1", 0, 4), ("pp4", 3, 1), ("pp4,vp2", 0, 11), ("pp4,vp2", 3, 5), ("one", 0, 1)],
)
def test_chunks_in_flight(layout: str, rank: int, chunks: int) -> None:
    """1F1B: one for each later rank and itself; interleaved: (4 - 1 - r) * 2 + (2 - 1) * 4 + 1."""
    assert chunks_in_flight(parse_layout(layout), 100, rank) == chunks
    assert chunks_in_flight(parse_layout(layout), 1, rank) <= parse_layout(layout).virtual_pipeline


@pytest.mark.parametrize(
    "layout", ["pp2", "pp4,vp2", "pp2,layers3+29", "tp4,sp,pp4", "ep8,pp2", "tp2,sp,ep4,etp1,pp4"]
)
def test_ranks_add_up(layout: str) -> None:
    """All ranks together hold every weight once, and norms and routers once for each tensor-parallel rank."""
    one = parse_layout(layout)
    for model in (LLAMA.moe(), LLAMA.dense()):
        if model.stage == "expert" and one.expert > 1:
            continue
        held = [rank_parameters(model, one, rank) for rank in range(one.pipeline)]
        again = (one.tensor - 1) * (model.counts.norms + model.counts.routers)
        gates = model.upper_layers * 14336 if model.stage == "expert" else 0
        total = sum(one.tensor * (h.dense + h.gates) + one.expert * one.etp * h.experts for h in held)
        assert total == model.counts.total + again + gates


def test_in_the_expert_stage_only_masked_mlps_have_state() -> None:
    counts = rank_parameters(LLAMA.dense(), ONE, 0)
    assert counts.trained == 24 * (3 * 4096 * 14336 + 14336)
    distributed = parse_layout("dp8,distopt")
    memory = peak_memory(LLAMA.dense(), distributed, Workload(seq_length=4096, micro_batch=1, global_batch=8))
    assert memory.optimizer == pytest.approx((24 * 3 * 4096 * 14336 * 12 + 24 * 14336 * 8) / 8)

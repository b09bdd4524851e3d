"""Every rule by hand: what it says, with the numbers, and that the layout which it names keeps all rules."""

import dataclasses
import time

import pytest

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe import layout_rules as rules
from megatron_l0moe.recipe.layout import Layout, parse_layout
from megatron_l0moe.recipe.layout_rules import JobSizes

LLAMA = JobSizes(
    layers=32,
    heads=32,
    query_groups=8,
    ffn=14336,
    vocab=128256,
    experts=64,
    expert_ffn=3584,
    seq_length=4096,
    micro_batch=1,
    global_batch=128,
    has_gpu=True,
)
"""Llama-3-8B cut into 64 experts of a quarter of its FFN."""
NAMES = {
    **{field.name: field.name for field in dataclasses.fields(Layout)},
    **{field.name: field.name for field in dataclasses.fields(JobSizes)},
}


def refused(layout: Layout, sizes: JobSizes = LLAMA) -> str:
    with pytest.raises(L0MoEError) as caught:
        rules.check_layout(layout, sizes, NAMES)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "changes", "clause", "nearest"),
    [
        ("ep3", {}, "experts (64) must be divisible by expert (3)", "ep4 (4 processes)"),
        (
            "ep2",
            {"experts": 0},
            "expert (2) must be 1, since this stage trains a dense model",
            "dp2 (2 processes)",
        ),
        ("tp3,sp,ep2,etp3", {}, "expert_ffn (3584) must be divisible by expert_tensor (3)", None),
        ("tp3,sp", {}, "expert_ffn (3584) must be divisible by tensor (3)", None),
        ("tp3", {"experts": 0}, "tensor (3) must divide the model's 32 attention heads", None),
        ("tp16,sp", {}, "tensor (16) must divide the model's 8 KV heads", "tp8,sp,dp2 (16 processes)"),
        (
            "tp4,sp",
            {"ffn": 14338},
            "tensor (4) must divide the model's 14338 FFN channels",
            "tp2,sp,dp2 (4 processes)",
        ),
        (
            "tp4,sp",
            {"vocab": 128254},
            "tensor (4) must divide the vocabulary of 128254 without padding, which here adds 2 random rows",
            "tp2,sp,dp2 (4 processes)",
        ),
        ("tp8,sp", {"vocab_multiple": 128}, "which here adds 768 random rows", "tp2,sp,dp4 (8 processes)"),
        ("tp2", {}, "tensor (2) with experts (64) needs sequence", "tp2,sp (2 processes)"),
        ("tp8,sp", {"seq_length": 4092}, "seq_length (4092) must be divisible by the 8 parts", "tp4,sp,dp2"),
        ("cp2", {"has_gpu": False}, "context (2) must be 1 without a GPU", "dp2 (2 processes)"),
        ("vp2", {}, "virtual_pipeline (2) needs pipeline (1) above 1", "one (1 process)"),
        (
            "pp2,vp2,batched-p2p",
            {},
            "virtual_pipeline (2) on pipeline (2) needs overlapped pipeline messages",
            "pp2,vp2 (2 processes)",
        ),
        (
            "pp5",
            {},
            "pipeline (5) must divide the model's 32 layers, or pipeline_layers must say",
            "pp4 (4 processes)",
        ),
        (
            "pp2,vp3",
            {},
            "pipeline (2) * virtual_pipeline (3) must divide the model's 32 layers",
            "pp2,vp2 (2 processes)",
        ),
        (
            "pp2,layers15+16",
            {},
            "pipeline_layers (15+16) must be 2 numbers, one a stage, with the sum 32",
            "pp2",
        ),
        ("pp2,layers8+8+16", {}, "pipeline_layers (8+8+16) must be 2 numbers", "pp2 (2 processes)"),
        (
            "dp3",
            {},
            "global_batch (128) must be divisible by micro_batch * data-parallel size (1 * 3 = 3)",
            "dp4 (4 processes)",
        ),
        (
            "pp2,vp2,dp128",
            {},
            "needs micro-batches in groups of pipeline (2), not 1 (global_batch 128 / 128)",
            None,
        ),
    ],
)
def test_rule(text: str, changes: dict[str, int], clause: str, nearest: str | None) -> None:
    sizes = dataclasses.replace(LLAMA, **changes)
    sentence = refused(parse_layout(text), sizes)
    assert clause in sentence
    advice = sentence.split("; the nearest layout that works is ")[1]
    assert nearest is None or advice.startswith(nearest)
    rules.check_layout(parse_layout(advice.split(" (")[0]), sizes, NAMES)


def test_number_of_processes() -> None:
    sentence = refused(Layout(processes=6, tensor=4, sequence=True))
    assert sentence == (
        "processes (6) must be divisible by tensor * pipeline * context (4 * 1 * 1 = 4) and by expert-tensor * expert "
        "* pipeline (4 * 1 * 1 = 4); the nearest layout that works is tp4,sp,dp2 (8 processes)."
    )
    # expert-tensor 1: the experts alone do not fit on 6
    assert "(1 * 4 * 1 = 4); the nearest" in refused(Layout(processes=6, expert=4))


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        (Layout(processes=100_003), {}),
        (Layout(processes=131_072, expert=3), {}),
        (
            Layout(processes=110_880, tensor=5040, expert=2520, pipeline=2, virtual_pipeline=1024),
            {"layers": 720},
        ),
        (
            Layout(processes=131_071, tensor=65_536, expert_tensor=120, context=720),
            {"heads": 5040, "experts": 2520},
        ),
        (
            Layout(processes=65_536, expert=4096, pipeline=720),
            {"global_batch": 6_983_776_800, "layers": 1260},
        ),
        (Layout(processes=99_991, expert=64), {"heads": None, "layers": None, "global_batch": None}),
    ],
)
def test_the_nearest_layout_is_found_soon(layout: Layout, changes: dict[str, int | None]) -> None:
    sizes = dataclasses.replace(LLAMA, **{"query_groups": None, "ffn": None, "expert_ffn": None} | changes)
    begun = time.process_time()
    found = rules.nearest_layout(layout, sizes)
    assert time.process_time() - begun < 3  # a second on a machine of its own
    assert found is not None
    assert rules.problem(found, sizes, NAMES) is None
    assert found.processes <= 2 * layout.processes


def test_a_batch_that_no_layout_can_share() -> None:
    sizes = dataclasses.replace(LLAMA, micro_batch=3)
    assert refused(Layout(), sizes).endswith(
        "no layout works with this batch, the nearest one that does is 129."
    )


@pytest.mark.parametrize(
    "text",
    [
        "one",
        "dp128",
        "tp8,sp,ep8",
        "pp4,vp2,ep16",
        "pp2,layers15+17",
        "pp4,vp2,batched-p2p",
        "cp2,tp2,sp,ep4,etp1",
    ],
)
def test_layouts_that_work(text: str) -> None:
    rules.check_layout(parse_layout(text), LLAMA, NAMES)


def test_what_is_not_known_is_not_checked() -> None:
    rules.check_layout(parse_layout("tp3,pp5"), JobSizes(), NAMES)


def test_an_uneven_split_by_flags_is_left_to_megatron() -> None:
    rules.check_layout(
        Layout(processes=5, pipeline=5, uneven=True), dataclasses.replace(LLAMA, global_batch=None), NAMES
    )

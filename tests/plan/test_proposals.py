"""Proposed layouts: they obey the rules, fit, are ordered, and what does not fit is explained with numbers."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from gpu_readiness.models_7b import GPUS as GPU_COUNTS
from gpu_readiness.models_7b import recipe_on, recipe_text

from megatron_l0moe.chain.preflight import check_sizes
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.plan import proposals
from megatron_l0moe.plan.memory import Workload, peak_memory
from megatron_l0moe.plan.plan import TABLE5, make_plan, recipe_keys
from megatron_l0moe.plan.proposals import Candidate, Proposals, evaluate, propose, refusal_text, refuse
from megatron_l0moe.plan.tables import layout_block
from megatron_l0moe.recipe.layout import parse_layout
from megatron_l0moe.recipe.layout_rules import problem
from megatron_l0moe.recipe.recipe import Recipe, load_recipe
from megatron_l0moe.sizes.flops import Recompute
from megatron_l0moe.sizes.gpu_models import GIB, GPUS, GPUS_PER_NODE, find_gpu

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGE = EXAMPLES.parent / "docs" / "plan.md"
NAMES = ("llama3_8b", "mistral_7b", "qwen2_7b")
H100 = GPUS["h100"]
LLAMA = TABLE5[0]


@pytest.mark.parametrize("gpus", [8, 64, 512])
@pytest.mark.parametrize("name", NAMES)
def test_proposals_obey_the_rules_and_fit(name: str, gpus: int) -> None:
    recipe = load_recipe(EXAMPLES / f"{name}.yaml")
    plan = make_plan(recipe, gpu=H100, gpus=gpus)
    shown = [_cell(stage.proposals.fitting[0]) for stage in plan.stages if stage.proposals]
    assert f"| {name} | {gpus} | {shown[0]} | {shown[1]} |" in PAGE.read_text(encoding="utf-8")
    for stage in plan.stages:
        found = stage.proposals
        assert found is not None
        assert len(found.fitting) > 5
        hours = [one.hours for one in found.fitting]
        assert hours == sorted(hours)
        for one in found.fitting:
            assert problem(one.layout, stage.job.sizes, stage.job.names) is None
            assert one.memory.total <= H100.usable
            assert one.at_once * one.layout.processes <= gpus
            assert 0.0 < one.time.mfu < proposals.DENSE_EFFICIENCY
        for one in (found.fitting[0], found.fitting[-1]):
            raw = recipe.model_dump()
            section = raw[stage.section]
            keys = recipe_keys(one)
            raw[stage.section] = section | keys | {"flags": section["flags"] | keys.get("flags", {})}
            changed = Recipe.model_validate(raw)
            check_sizes(changed, plan.dense.architecture)
            assert changed.parallel(stage.section).layout == one.layout
            mine = next(s for s in make_plan(changed, gpu=H100).stages if s.section == stage.section)
            assert (mine.excess, mine.mine.memory) == (0.0, one.memory)


@pytest.mark.parametrize("gpus", GPU_COUNTS)
@pytest.mark.parametrize("name", NAMES)
def test_the_recipes_have_the_fastest(name: str, gpus: int) -> None:
    """The recipe says, word by word, what plan prints; plan of it says that it fits; and it is what a job gets."""
    plan = make_plan(recipe_on(name, gpus), gpu=H100, gpus=gpus)
    block = layout_block(plan)
    assert "\n".join([*block, ""]) in recipe_text(name, gpus)
    assert plan.problem() is None
    for stage in plan.stages:
        assert stage.excess == 0.0
        assert stage.proposals is not None
        fastest = stage.proposals.fitting[0]
        assert (stage.mine.layout, stage.mine.recompute) == (fastest.layout, fastest.recompute)
        assert stage.mine.layout.processes <= gpus
    experts, moe = (stage.mine.hours for stage in plan.stages)
    cost = f"{(experts + moe) * gpus:,.0f} | {sum(stage.gpu_hours for stage in plan.stages):,.0f}"
    row = f"| {name} | {gpus} | {experts:.1f} | {moe:.1f} | {cost} |"
    assert row in (EXAMPLES.parent / "docs" / "cluster.md").read_text(encoding="utf-8")
    at_once = plan.recipe.expert_training.at_once
    assert at_once * plan.recipe.expert_training.parallel.processes == GPUS_PER_NODE


def test_every_layout_of_a_recipe_is_one_of_these() -> None:
    for name in NAMES:
        raw = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"))
        assert tuple(raw["layouts"]) == GPU_COUNTS


def _cell(one: Candidate) -> str:
    return f"{one.layout.text}, {one.recompute.text}, {one.memory.total / GIB:.1f} GiB"


def moe_proposals(gpu: str, gpus: int) -> Proposals:
    recipe = load_recipe(EXAMPLES / "llama3_8b.yaml")
    found = make_plan(recipe, gpu=find_gpu(gpu), gpus=gpus).stages[1].proposals
    assert found is not None
    return found


def test_what_does_not_fit_is_explained() -> None:
    found = moe_proposals("h100", 8)
    assert {one.candidate.layout for one in found.refused}.isdisjoint(one.layout for one in found.fitting)
    for one in found.refused:
        assert one.candidate.memory.total == one.excess + H100.usable > H100.usable
        assert one.instead is not None
        assert one.instead.memory.total <= H100.usable
    text = refusal_text(found.refused[0], H100)
    assert f"{found.refused[0].excess / GIB:.1f} more than the {H100.usable / GIB:.1f}" in text
    assert "the nearest that fits is" in text


def test_more_memory_refuses_less() -> None:
    """The control: the same layouts on a GPU with more memory."""
    fits = {gpu: {one.layout for one in moe_proposals(gpu, 8).fitting} for gpu in ("h100", "h200")}
    assert fits["h100"] < fits["h200"]
    assert moe_proposals("h200", 8).fitting[0].hours <= moe_proposals("h100", 8).fitting[0].hours


def test_nothing_fits_on_one_gpu() -> None:
    found = moe_proposals("a100", 1)
    assert found.fitting == ()
    assert "take more GPUs or a smaller micro-batch" in refusal_text(found.refused[0], GPUS["a100"])


def test_kv_heads_refuse_tensor_parallelism() -> None:
    recipe = load_recipe(EXAMPLES / "qwen2_7b.yaml")
    found = make_plan(recipe, gpu=H100, gpus=64).stages[1].proposals
    assert found is not None
    assert all(one.layout.tensor <= 4 for one in found.fitting)
    assert any("model's 28 attention heads" in example for example, _ in found.broken)


def test_nearest_is_one_change_away() -> None:
    """Recomputation is what fits where only activations are too large; of MLPs alone it is the faster one."""
    recipe = load_recipe(EXAMPLES / "llama3_8b.yaml")
    stage = make_plan(recipe, gpu=H100, gpus=8).stages[0]
    small = dataclasses.replace(H100, memory=20 * GIB)
    layout = parse_layout("tp4,sp,dp2,distopt")
    mine = evaluate(stage.job, layout, Recompute(), small, 8)
    assert mine.memory.total > small.usable
    refused = refuse(mine, propose(stage.job, small, 8).all_fitting, small)
    assert refused.instead is not None
    assert (refused.instead.layout, refused.instead.recompute.text) == (layout, "mlp")


def test_step_time_by_hand() -> None:
    """Dense Llama-3-8B's expert stage on one node, tp2 x dp4, 16 micro-batches each, without recomputation."""
    layout = parse_layout("tp2,sp,dp4,distopt")
    workload = Workload(seq_length=4096, micro_batch=1, global_batch=64)
    time = proposals.step_time(LLAMA.dense(), layout, workload, H100)
    attention, scores = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024), 2 * 4096 * 4096
    ffn, head = 2 * 3 * 4096 * 14336, 2 * 128256 * 4096
    token = 32 * (attention + scores + ffn) + head  # forward
    token += head + 23 * (attention + 2 * scores) + 24 * 2 * ffn
    assert time.flops == 64 * 4096 * token
    assert time.computation == pytest.approx(16 * 2048 * token / (0.55 * 989.4e12))
    hidden = 4096 * 4096 * 2
    layers = 24 + 8 / 3  # bottom layers: forward only
    assert time.tensor == pytest.approx(16 * 2 * layers * 4 * hidden / 2 / (0.7 * 450e9))
    trained = 24 * (3 * 4096 * 14336 // 2 + 14336 // 2 + 2)
    assert time.gradients == pytest.approx(trained * 6 * 3 / 4 / (0.7 * 450e9))
    assert (time.pipeline, time.expert) == (0.0, 0.0)
    assert time.mfu == pytest.approx(time.flops / time.seconds / (8 * 989.4e12))


def test_few_rows_wait_for_the_experts_weights() -> None:
    """1024 tokens give each of 64 experts 32 rows, too few; spread over 8 ranks each gets 256."""
    moe, workload = LLAMA.moe(), Workload(seq_length=1024, micro_batch=1, global_batch=64)
    times = {n: proposals.step_time(moe, parse_layout(f"ep{n},dp64,distopt"), workload, H100) for n in (1, 8)}
    experts = 24 * 3 * 64 * 3 * 4096 * 1024
    everything = 3 * (2 * 1024 * (moe.counts.active - moe.counts.norms) + 1024 * 32 * 2 * 1024 * 4096)
    products = 24 * 3 * 2 * 1024 * 2 * 3 * 4096 * 1024
    base = (everything - products) / (0.55 * 989.4e12)
    assert times[1].computation == pytest.approx(base + experts * 2 / 3.35e12)
    assert times[8].computation == pytest.approx(base + products / (0.35 * 989.4e12))
    assert times[1].computation > times[8].computation


def test_what_costs_more_takes_longer() -> None:
    moe = LLAMA.moe()
    workload = Workload(seq_length=4096, micro_batch=1, global_batch=128)
    times = {
        text: proposals.step_time(moe, parse_layout(text), workload, H100)
        for text in (
            "ep8,dp64,distopt",
            "ep16,dp64,distopt",
            "pp4,ep8,dp16,distopt",
            "pp4,vp2,ep8,dp16,distopt",
        )
    }
    assert times["ep16,dp64,distopt"].expert > 5 * times["ep8,dp64,distopt"].expert  # leaves the node
    assert times["pp4,vp2,ep8,dp16,distopt"].pipeline < times["pp4,ep8,dp16,distopt"].pipeline
    full = dataclasses.replace(workload, recompute=Recompute(granularity="full"))
    again = proposals.step_time(moe, parse_layout("ep8,dp64,distopt"), full, H100)
    assert again.computation > times["ep8,dp64,distopt"].computation
    assert again.mfu < times["ep8,dp64,distopt"].mfu
    kept = peak_memory(moe, parse_layout("ep8,dp64,distopt"), workload)
    assert peak_memory(moe, parse_layout("ep8,dp64,distopt"), full).total < kept.total


def test_unknown_gpu() -> None:
    with pytest.raises(L0MoEError, match=r"no GPU 'h1000', did you mean 'h100'|no GPU 'h1000'"):
        find_gpu("h1000")

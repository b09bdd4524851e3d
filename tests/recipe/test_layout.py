"""The short text form of layouts, by hand and back again.

`gpus` and `layouts` of a recipe: the block that holds, what a block may say, and that no result depends on it.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml
from toy_recipe import write_recipe

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.layout import Layout, parse_layout, parse_layouts
from megatron_l0moe.recipe.recipe import Recipe, load_recipe
from megatron_l0moe.runs.stages import STAGE_NAMES, config_hash

EXAMPLES = {
    "one": Layout(),
    "dp2,distopt": Layout(processes=2, distributed_optimizer=True),
    "tp2,sp": Layout(processes=2, tensor=2, sequence=True),
    "pp2,vp2": Layout(processes=2, pipeline=2, virtual_pipeline=2),
    "pp2,layers1+3": Layout(processes=2, pipeline=2, pipeline_layers=(1, 3)),
    "pp4,vp2,batched-p2p": Layout(processes=4, pipeline=4, virtual_pipeline=2, overlap_p2p=False),
    "ep4,alltoall": Layout(processes=4, expert=4, dispatcher="alltoall"),
    # experts follow tensor parallelism: 2 ranks an expert, 2 groups of them
    "tp2,sp,ep2": Layout(processes=4, tensor=2, sequence=True, expert=2),
    # whole experts on each rank: two ranks hold all experts and one copy of the dense part
    "tp2,sp,ep2,etp1": Layout(processes=2, tensor=2, sequence=True, expert=2, expert_tensor=1),
    "tp2,sp,ep2,etp1,dp2": Layout(processes=4, tensor=2, sequence=True, expert=2, expert_tensor=1),
    "cp2": Layout(processes=2, context=2),
}


@pytest.mark.parametrize(("text", "layout"), EXAMPLES.items(), ids=EXAMPLES)
def test_text_and_back(text: str, layout: Layout) -> None:
    assert parse_layout(text) == layout
    assert parse_layout(layout.text) == layout


def test_a_list() -> None:
    assert [layout.text for layout in parse_layouts("tp2, sp; ep2;;pp2;")] == ["tp2,sp", "ep2", "pp2"]


def test_data_parallel_size() -> None:
    assert Layout(processes=16, tensor=2, pipeline=2).data == 4
    assert Layout(processes=16, tensor=2, expert=4, expert_tensor=1).expert_product == 4
    assert Layout(processes=16, tensor=2, expert=4).expert_product == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "tp2,xp2",
            r"The layout 'tp2,xp2' has the word 'xp2' \(did you mean '\w+2'\?\); known words are tp2, pp2",
        ),
        ("tp", r"has the word 'tp'"),
        ("tp0", r"has the word 'tp0'"),
        ("ep2,ep4", r"The layout 'ep2,ep4' says expert twice, in 'ep4'; remove one of the two\."),
        ("tp2,,sp", r"has the word ''"),
        (" ; ", r"No layout was given; write layouts as 'tp2,sp;ep2;pp2'\."),
    ],
)
def test_what_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(L0MoEError, match=message):
        parse_layouts(text)


LAYOUTS: dict[int, Any] = {
    2: {
        "expert_training": {"at_once": 2, "parallel": {"processes": 1}},
        "moe_training": {"parallel": {"processes": 2, "expert": 2}},
    },
    4: {
        "expert_training": {"parallel": {"processes": 2, "tensor": 2}},
        "moe_training": {
            "parallel": {"processes": 4, "tensor": 2, "expert": 2, "distributed_optimizer": True},
            "flags": {"recompute-granularity": "full", "recompute-method": "uniform"},
        },
    },
}
SECTION_FLAGS = {"bf16": True}


def write(folder: Path, gpus: int, **changes: Any) -> Path:
    """Write the toy recipe with these layouts."""
    return write_recipe(
        folder, **{"gpus": gpus, "layouts": LAYOUTS, "moe_training__flags": SECTION_FLAGS} | changes
    )


def test_the_block_that_holds(tmp_path: Path) -> None:
    two, four = (load_recipe(write(tmp_path, gpus)) for gpus in (2, 4))
    assert (two.expert_training.at_once, four.expert_training.at_once) == (2, 1)
    assert [r.moe_training.parallel.layout.text for r in (two, four)] == ["ep2", "tp2,sp,ep2,distopt"]
    assert two.moe_training.flags == {"bf16": True}
    assert four.moe_training.flags == SECTION_FLAGS | LAYOUTS[4]["moe_training"]["flags"]
    assert two.expert_training.global_batch_size == 2  # what the section says stays


def test_it_is_like_a_recipe_without(tmp_path: Path) -> None:
    plain = write_recipe(
        tmp_path,
        expert_training__at_once=2,
        moe_training__parallel=LAYOUTS[2]["moe_training"]["parallel"],
        moe_training__flags=SECTION_FLAGS,
    )
    expected = load_recipe(plain)
    found = load_recipe(write(tmp_path, 2))
    assert (type(found), found.gpus) == (Recipe, 2)
    assert found == expected.model_copy(update={"gpus": 2})
    assert Recipe.model_validate(found.model_dump()) == found
    again = tmp_path / "resolved.yaml"
    again.write_text(yaml.safe_dump(found.model_dump()), encoding="utf-8")
    assert load_recipe(again) == found


def test_results_do_not_depend_on_it(tmp_path: Path) -> None:
    def hashes(**changes: Any) -> list[str]:
        return [config_hash(name, load_recipe(write(tmp_path, **changes))) for name in STAGE_NAMES]

    assert hashes(gpus=2) == hashes(gpus=4)
    kept = {"moe_training__flags": SECTION_FLAGS | {"save-retain-interval": 10}}
    assert hashes(gpus=2) == hashes(gpus=2, **kept)
    assert hashes(gpus=2) != hashes(gpus=2, moe_training__flags={})  # control


def block(section: str, **keys: Any) -> dict[int, Any]:
    """Return the layouts with keys added to a section of the block for 4 GPUs."""
    return LAYOUTS | {4: LAYOUTS[4] | {section: LAYOUTS[4][section] | keys}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gpus": 3},
            r"gpus \(3\) must be one of the numbers in layouts, 2, 4; add what `l0moe plan RECIPE --gpus 3` prints",
        ),
        (
            {"gpus": None},
            r"layouts need gpus, the number that holds; add gpus: 2, or another of 2, 4\.$",
        ),
        (
            {"layouts": {"4": LAYOUTS[4]}},
            r"layouts\.4: this key is not allowed \(Input should be a valid integer\), got '4'",
        ),
        ({"gpu": 4}, r"unknown key 'gpu' \(did you mean 'gpus'\?\)"),
        (
            {"layouts": block("moe_training", micro_batch_size=2)},
            r"unknown key 'layouts\.4\.moe_training\.micro_batch_size'",
        ),
        ({"layouts": block("moe_training", at_once=2)}, r"unknown key 'layouts\.4\.moe_training\.at_once'"),
        (
            {"layouts": block("expert_training", parallel={"tensr": 2})},
            r"unknown key 'layouts\.4\.expert_training\.parallel\.tensr' \(did you mean 'tensor'\?\)",
        ),
        (
            {"layouts": block("moe_training", flags={"clip-grad": 0.5})},
            r"layouts\.4\.moe_training\.flags: flag 'clip-grad' is none of recomputation, and no other may change",
        ),
        (
            {"layouts": block("moe_training", parallel={"processes": 8})},
            r"layouts\.4\.moe_training\.parallel\.processes \(8\) must be at most 4, the number of GPUs",
        ),
        (  # the block that does not hold is checked as well
            {"gpus": 2, "layouts": block("moe_training", parallel={"processes": 3})},
            r"layouts\.4: moe_training\.sequences_per_domain \* num_experts \(4\) must be divisible by",
        ),
        (
            {"expert_training__parallel": {"processes": 2}},
            r"expert_training\.parallel may not stand beside layouts, which say it for each number of GPUs; remove it",
        ),
        ({"expert_training__at_once": 2}, r"expert_training\.at_once may not stand beside layouts"),
        (
            {"moe_training__flags": {"recompute-granularity": "full"}},
            r"moe_training\.flags\.recompute-granularity may not stand beside layouts",
        ),
        ({"model__top_k": 5}, r"recipe\.yaml: model\.top_k \(5\) must be at most"),  # not a layout's fault
    ],
)
def test_broken_rule(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = write_recipe(tmp_path, **_written(changes))
    with pytest.raises(L0MoEError, match=message) as caught:
        load_recipe(file)
    assert "\n" not in str(caught.value)


def _written(changes: dict[str, Any]) -> dict[str, Any]:
    values = {"gpus": 4, "layouts": LAYOUTS} | changes
    return {key: value for key, value in values.items() if value is not None}

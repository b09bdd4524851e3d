"""The short text form of layouts, by hand and back again."""

import pytest

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.layout import Layout, parse_layout, parse_layouts

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

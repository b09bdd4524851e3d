"""Selection, gates and overlap by hand and against naive loops."""

import math

import pytest
import torch

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.experts.extraction import (
    GateSettings,
    chance_iou,
    deterministic_gate,
    overlap,
    select_units,
    units_of_mask,
)


def naive_units(values, width):
    """Take the largest value again and again; the first of equals wins."""
    left = list(enumerate(values))
    chosen = []
    for _ in range(width):
        best = left[0]
        for candidate in left[1:]:
            if candidate[1] > best[1]:
                best = candidate
        left.remove(best)
        chosen.append(best[0])
    return sorted(chosen)


@pytest.mark.parametrize("width", [1, 7, 30])
def test_units_equal_the_naive_loop_with_many_ties(width):
    generator = torch.Generator().manual_seed(width)
    log_alpha = torch.randint(-3, 3, (30,), generator=generator).float()
    units = select_units(log_alpha, width)
    assert units.tolist() == naive_units(log_alpha.tolist(), width)
    assert units.dtype is torch.int64


def test_units_by_hand():
    assert select_units(torch.tensor([0.5, 2.0, 2.0, -1.0, 2.0]), 2).tolist() == [1, 2]
    assert select_units(torch.zeros(5), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("width", [0, 6])
def test_width_must_fit(width):
    with pytest.raises(L0MoEError, match=rf"width \({width}\) must be between 1 and the layer's 5 FFN units"):
        select_units(torch.zeros(5), width)


def test_nan_is_refused():
    with pytest.raises(L0MoEError, match="log_alpha holds NaN"):
        select_units(torch.tensor([0.0, math.nan]), 1)


def test_a_frozen_mask_must_have_exactly_the_width():
    mask = torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert units_of_mask(mask, 2).tolist() == [1, 3]
    with pytest.raises(L0MoEError, match="keeps 2 units, but the expert width is 3"):
        units_of_mask(mask, 3)


def test_gate_by_hand():
    """log_alpha 0: s = 1/2, z = 0.5 * 1.2 - 0.1 = 0.5; far ends are clipped to exactly 0 and 1."""
    z = deterministic_gate(torch.tensor([0.0, -10.0, 10.0, 0.83 * math.log(3.0)]), GateSettings())
    assert z.tolist() == pytest.approx([0.5, 0.0, 1.0, 0.75 * 1.2 - 0.1], abs=1e-7)
    assert z[1] == 0
    assert z[2] == 1
    other = deterministic_gate(
        torch.tensor([1.0]), GateSettings(temperature=2.0, stretch_low=-0.5, stretch_high=1.5)
    )
    assert float(other) == pytest.approx(2 / (1 + math.exp(-0.5)) - 0.5, abs=1e-6)


def test_overlap_by_hand():
    """{0,1}, {1,2}, {4,5} of 8: one shared unit of three in the first pair, none in the others; 5 of 8 covered."""
    result = overlap([torch.tensor(u) for u in ([0, 1], [1, 2], [4, 5])], 8)
    flat = [x for row in result.iou_matrix for x in row]
    assert flat == pytest.approx([1, 1 / 3, 0, 1 / 3, 1, 0, 0, 0, 1])
    assert result.mean_iou == pytest.approx(1 / 9)
    assert result.coverage == pytest.approx(5 / 8)


def test_overlap_equals_sets():
    generator = torch.Generator().manual_seed(0)
    units = [torch.randperm(40, generator=generator)[:13] for _ in range(4)]
    result = overlap(units, 40)
    sets = [set(u.tolist()) for u in units]
    expected = [[len(a & b) / len(a | b) for b in sets] for a in sets]
    assert [x for row in result.iou_matrix for x in row] == pytest.approx(
        [x for row in expected for x in row]
    )
    assert result.coverage == pytest.approx(len(set.union(*sets)) / 40)


def test_chance_iou_is_that_of_random_choices():
    generator = torch.Generator().manual_seed(0)
    units = [torch.randperm(400, generator=generator)[:100] for _ in range(40)]
    assert chance_iou(100, 400) == pytest.approx(1 / 7)
    assert overlap(units, 400).mean_iou == pytest.approx(chance_iou(100, 400), abs=0.005)
    assert chance_iou(400, 400) == 1.0

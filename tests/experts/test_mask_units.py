"""Units of a frozen Mixture-of-Masks: worked by hand, and the same function as the masked FFN."""

import pytest
import torch

from megatron_l0moe.conversion.mom_layout import ExpertWidths, MaskUnits, common_widths, sort_units
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.modules.mixture_of_masks import channel_factors, choose_masks

FLOAT64_ATOL = 1e-12  # the same products, summed in another order


def units(shared: int, *routed: int) -> MaskUnits:
    return MaskUnits(torch.arange(shared), tuple(torch.arange(n) for n in routed), torch.arange(0))


def test_units_worked_by_hand():
    masks = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 1, 1], [1, 1, 0, 0, 1]])
    found = sort_units(masks.float())
    assert found.shared.tolist() == [0, 4]
    assert [part.tolist() for part in found.routed] == [[1], [3], [1]]
    assert found.inactive.tolist() == [2]


def test_shared_and_routed_experts_are_the_masked_ffn():
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(4, 30, generator=generator) < 0.7).double()
    activation = torch.randn(9, 30, generator=generator, dtype=torch.float64)
    down = torch.randn(5, 30, generator=generator, dtype=torch.float64)
    weights, _ = choose_masks(torch.randn(9, 4, generator=generator, dtype=torch.float64), 2)
    expected = (activation * channel_factors(weights, masks)) @ down.T
    found = sort_units(masks)
    assert len(found.shared) > 2
    assert len(found.inactive) > 0

    def ffn(kept: torch.Tensor) -> torch.Tensor:
        return activation[:, kept] @ down[:, kept].T

    routed = sum(weights[:, e, None] * ffn(kept) for e, kept in enumerate(found.routed))
    assert (ffn(found.shared) + routed - expected).abs().max() < FLOAT64_ATOL
    assert (routed - expected).abs().max() > 0.1  # control: without the shared expert


@pytest.mark.parametrize(
    ("layers", "multiple", "expected"),
    [
        # two shared of 5 and two routed: 20 channels; one of 10 and two of 10: 30
        ([units(10, 5, 4)], 1, ExpertWidths(expert=5, num_shared=2)),
        # one of 6 makes 18 channels, two of 5 make 20
        ([units(6, 5, 5)], 1, ExpertWidths(expert=6, num_shared=1)),
        ([units(3, 2, 5), units(1, 7, 0)], 1, ExpertWidths(expert=7, num_shared=1)),
        ([units(0, 3, 4)], 1, ExpertWidths(expert=4, num_shared=0)),
        ([units(0, 3, 4)], 16, ExpertWidths(expert=16, num_shared=0)),
        ([units(40, 3, 4)], 16, ExpertWidths(expert=16, num_shared=3)),
        # all masks alike: the narrowest experts, all zero, beside the shared one
        ([units(6, 0, 0)], 1, ExpertWidths(expert=1, num_shared=6)),
    ],
)
def test_widths_worked_by_hand(layers: list[MaskUnits], multiple: int, expected: ExpertWidths):
    assert common_widths(layers, top_k=2, multiple=multiple) == expected


def test_bad_masks_are_refused():
    with pytest.raises(L0MoEError, match="hold other values than 0 and 1"):
        sort_units(torch.tensor([[1.0, 0.5]]))
    with pytest.raises(L0MoEError, match="hold other values than 0 and 1"):
        sort_units(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(L0MoEError, match="No mask keeps a unit in any layer"):
        common_widths([sort_units(torch.zeros(3, 4))], top_k=2)

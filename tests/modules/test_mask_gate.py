"""Mixture-of-Masks: numbers worked by hand, then the naive references in float64 with gradients."""

import itertools
import math

import equations
import pytest
import torch

from megatron_l0moe.modules.mixture_of_masks import (
    MaskConfig,
    activated,
    channel_factors,
    choose_masks,
    hard_masks,
    mask_sets,
    set_index,
    set_places,
)

FLOAT64_ATOL = 1e-12  # the same few products in another order
STEP = 1e-6  # of central differences, whose error is of size 1e-9 here
DIFFERENCE_ATOL = 1e-8
THIRD, TWO_THIRDS = 1 / 3, 2 / 3


def doubles(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_numbers_worked_by_hand():
    # logits log 2, 0, log 4, of which the first and last are chosen: weights 2/6 and 4/6
    weights, chosen = choose_masks(doubles([[math.log(2), 0.0, math.log(4)]]), 2)
    assert chosen.tolist() == [[0, 2]]
    assert torch.allclose(weights, doubles([[THIRD, 0.0, TWO_THIRDS]]))
    # channels: in all masks, in the first alone, in the one that is not chosen, in the last at half, in none
    z = doubles([[1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 0, 0.5, 0]])
    factors = channel_factors(weights, z)
    assert torch.allclose(factors, doubles([[1, THIRD, 0, THIRD, 0]]))
    assert (factors[0, 0], factors[0, 2], factors[0, 4]) == (1, 0, 0)  # exactly


def test_all_masks_open_is_a_factor_of_one_exactly():
    weights, _ = choose_masks(torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)), 4)
    z = torch.ones(8, 3)
    assert (channel_factors(weights, z) == 1).all()
    assert not (weights @ z == 1).all()  # control: the bare sum of weights


def test_sets_are_found_at_their_place():
    assert mask_sets(4, 2).tolist() == [[0, 1], [0, 2], [1, 2], [0, 3], [1, 3], [2, 3]]
    for masks, k in ((3, 2), (6, 2), (7, 3), (8, 4)):
        sets = mask_sets(masks, k)
        assert len(sets) == math.comb(masks, k)
        assert set_index(sets, set_places(masks, k)).tolist() == list(range(len(sets)))
    assert set_index(torch.tensor([[[1, 3]], [[0, 1]]]), set_places(4, 2)).tolist() == [[4], [0]]


def test_activated_fraction_worked_by_hand():
    # of four tokens three choose masks 0 and 1, and one 1 and 2
    probability = doubles([[1.0, 0.5, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.2]])
    load = doubles([0.75, 0.0, 0.25])
    found = activated(probability, mask_sets(3, 2), load)
    assert torch.allclose(found, doubles([0.75, 0.75 * 0.75 + 0.25 * 0.5, 0.25 * 0.2]))
    evenly = activated(probability, mask_sets(3, 2), doubles([THIRD] * 3))  # control: who chooses matters
    assert not torch.allclose(found, evenly)


@pytest.mark.parametrize(("masks", "k"), [(3, 2), (5, 2), (6, 3)])
def test_naive_references(masks: int, k: int):
    generator = torch.Generator().manual_seed(masks)
    tokens, channels = 7, 5
    logits = torch.randn(tokens, masks, generator=generator, dtype=torch.float64)
    z = torch.rand(masks, channels, generator=generator, dtype=torch.float64)
    z[:, 1] = 1.0
    z[0, 2], z[1, 3] = 0.0, 1.0
    weights, chosen = choose_masks(logits, k)
    rows = [equations.mix_masks(row.tolist(), z.tolist(), k) for row in logits]
    assert chosen.tolist() == [row.chosen for row in rows]
    expected = doubles([row.factors for row in rows])
    assert (channel_factors(weights, z) - expected).abs().max() < FLOAT64_ATOL
    sets = mask_sets(masks, k)
    load = torch.bincount(set_index(chosen, set_places(masks, k)), minlength=len(sets)) / tokens
    fraction = float(activated(z, sets, load.double()).mean())
    right = equations.activated_fraction(z.tolist(), [row.chosen for row in rows])
    # the load came in float32
    assert fraction == pytest.approx(right, abs=1e-7)


def test_gradients_are_those_of_central_differences():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    z = (0.1 + 0.8 * torch.rand(4, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    sets, load = mask_sets(4, 2), doubles([0.3, 0.1, 0.2, 0.2, 0.2, 0.0])

    def value() -> torch.Tensor:
        weights, _ = choose_masks(logits, 2)
        return (channel_factors(weights, z) * upstream).sum() + 2 * activated(z, sets, load).mean()

    found = torch.autograd.grad(value(), (logits, z))
    for tensor, gradient in zip((logits, z), found, strict=True):
        for place in itertools.product(*(range(n) for n in tensor.shape)):
            with torch.no_grad():
                tensor[place] += STEP
                above = value()
                tensor[place] -= 2 * STEP
                below = value()
                tensor[place] += STEP
            assert float((above - below) / (2 * STEP) - gradient[place]) == pytest.approx(
                0, abs=DIFFERENCE_ATOL
            )
        assert gradient.abs().max() > 1e-2


def test_hard_masks_worked_by_hand():
    # sets 01, 02, 12 with half, a quarter and a quarter of the tokens; entries by score:
    # mask 0 channel 0 -> 3/4 of a channel; mask 1 channel 0 -> 1; mask 2 channel 3 -> 1.5; mask 1 channel 3 -> 2
    log_alpha = torch.tensor([[9.0, 1, 1, 0], [8, 1, 1, 6], [0, 0, 0, 7]])
    load = doubles([0.5, 0.25, 0.25])
    sets = mask_sets(3, 2)
    assert hard_masks(log_alpha, sets, load, 0.5).tolist() == [[1, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 1]]
    assert hard_masks(log_alpha, sets, load, 0.49).tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    # ties of 1: channel 1 before channel 2, mask 0 before mask 1
    assert hard_masks(log_alpha, sets, load, 0.7).tolist() == [[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 1]]
    all_alike = hard_masks(torch.ones(3, 4), sets, load, 0.5)
    assert all_alike.tolist() == [[1, 1, 0, 0]] * 3  # and not mask 0 before all others
    assert hard_masks(log_alpha, sets, load, 1e-3).sum() == 1
    assert hard_masks(log_alpha, sets, load, 1.0).sum() == 12


@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
def test_hard_masks_come_close_to_the_target_from_below(target: float):
    generator = torch.Generator().manual_seed(2)
    log_alpha = torch.randn(5, 200, generator=generator)
    sets = mask_sets(5, 2)
    load = torch.rand(len(sets), generator=generator)
    load /= load.sum()
    masks = hard_masks(log_alpha, sets, load, target)
    fraction = float(activated(masks.double(), sets, load).mean())
    assert target - 1 / 200 <= fraction <= target + 1e-6
    assert log_alpha[masks == 1].min() > log_alpha[masks == 0].max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l0_masks_top_k": 1}, r"l0_masks_top_k must be at least 2 and below l0_masks \(8\), got 1"),
        ({"l0_masks": 2}, r"at least 2 and below l0_masks \(2\), got 2"),
        ({"l0_masks": 33}, "make 528 sets of masks, which must be at most 512"),
        ({"l0_masks_target": 1.0}, "l0_masks_target must be above 0 and below 1, got 1.0"),
        ({"l0_masks_balance_coeff": -0.1}, "l0_masks_balance_coeff must be at least 0"),
        ({"l0_masks_init_std": 0.0}, "l0_masks_init_std must be above 0"),
    ],
)
def test_wrong_settings_are_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MaskConfig(**change)

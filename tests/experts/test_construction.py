"""Every method keeps exactly the asked width, is the dense layer at full width, and never returns a dead layer."""

import pytest
import torch
from experts.correlated import DENSE, HIDDEN, calibrated, correlated

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.experts.construction import (
    PAIRS,
    ConstructionSettings,
    construct_layer,
    magnitude_scores,
    random_units,
)
from megatron_l0moe.modules.hard_concrete import top_k

FFN = DENSE[0]


def settings(method, width, **changes):
    options = {"expert": 0, "num_experts": 3, "top_k": 2, "damping": 0.01, "shared": 0.5, "seed": 1}
    return ConstructionSettings(method=method, width=width, **(options | changes))


@pytest.mark.parametrize("method", PAIRS)
def test_full_width_is_the_dense_layer(method):
    inputs, activations, fc2 = correlated()
    made = construct_layer(settings(method, FFN), 1, calibrated(inputs, activations, method, fc2, FFN), fc2)
    assert torch.equal(made.units, torch.arange(FFN))
    down = fc2 if made.down is None else made.down.to(fc2.dtype)
    assert torch.equal(down, fc2)


@pytest.mark.parametrize("method", PAIRS)
@pytest.mark.parametrize("width", [1, 5, FFN - 1])
def test_width_is_exact(method, width):
    inputs, activations, fc2 = correlated()
    calibration = calibrated(inputs, activations, method, fc2, width)
    made = construct_layer(settings(method, width), 1, calibration, fc2)
    units = made.units.tolist()
    assert units == sorted(set(units))
    assert len(units) == width
    assert 0 <= units[0] <= units[-1] < FFN
    assert made.input_mean.shape == (HIDDEN,)
    assert made.down is None or made.down.shape == (HIDDEN, width)


@pytest.mark.parametrize("method", PAIRS)
@pytest.mark.parametrize("width", [0, FFN + 1])
def test_impossible_widths_are_refused(method, width):
    inputs, activations, fc2 = correlated()
    calibration = calibrated(inputs, activations, method, fc2, FFN)
    with pytest.raises(L0MoEError, match=rf"model\.expert_ffn \({width}\) must be between 1 and the {FFN}"):
        construct_layer(settings(method, width), 1, calibration, fc2)


def test_unknown_methods_are_refused():
    inputs, activations, fc2 = correlated()
    calibration = calibrated(inputs, activations, "magnitude", fc2, FFN)
    with pytest.raises(L0MoEError, match=r"no method 'wanda' without training; use random, magnitude"):
        construct_layer(settings("wanda", 4), 1, calibration, fc2)


def test_a_choice_that_kills_the_layer_is_refused():
    """The random choice of one unit falls on units that are never active."""
    inputs, activations, fc2 = correlated()
    chosen = int(random_units(1, 0, 1, FFN, 1))
    activations[:, chosen] = 0
    calibration = calibrated(inputs, activations, "random", fc2, 1)
    with pytest.raises(L0MoEError, match=r"The 1 units that method random kept of layer 1 are 0"):
        construct_layer(settings("random", 1), 1, calibration, fc2)
    other = next(layer for layer in range(2, 9) if int(random_units(1, 0, layer, FFN, 1)) != chosen)
    construct_layer(
        settings("random", 1), other, calibration, fc2
    )  # control: another layer draws another unit


def test_magnitude_by_hand():
    fc2 = torch.tensor([[3.0, 1.0, 0.0], [4.0, 0.0, 2.0]])  # columns of length 5, 1, 2
    squares = torch.tensor([4.0, 100.0, 36.0]).double()  # activations of length 2, 10, 6
    assert magnitude_scores(squares, fc2).tolist() == [10.0, 10.0, 12.0]
    assert top_k(magnitude_scores(squares, fc2), 2).tolist() == [0, 2]  # a tie goes to the lower index
    assert top_k(fc2.norm(dim=0), 2).tolist() == [0, 2]
    assert top_k(squares, 2).tolist() == [1, 2]  # control: either factor alone chooses otherwise


def test_magnitude_is_the_size_of_what_a_unit_adds():
    """||W_:j|| ||a_j|| = || W_:j a_j^T ||, summed token by token; float64."""
    _, activations, fc2 = correlated()
    scores = magnitude_scores(activations.double().square().sum(0), fc2)
    for j in range(FFN):
        added = sum(float((fc2[:, j].double() * a).square().sum()) for a in activations[:, j].double())
        assert float(scores[j]) == pytest.approx(added**0.5, rel=1e-12)


def test_random_is_keyed_by_seed_expert_and_layer():
    one = random_units(1, 2, 3, 100, 50)
    assert torch.equal(one, random_units(1, 2, 3, 100, 50))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2)):
        assert not torch.equal(one, random_units(*other, 100, 50))
    counts = sum(torch.bincount(random_units(s, 0, 0, 10, 3), minlength=10) for s in range(500))
    assert 110 < int(counts.min()) <= int(counts.max()) < 190  # 150 expected, standard deviation 10

"""Refit, OBS and SVD against naive float64 references that look at the tokens, and against each other."""

import pytest
import torch
from experts.correlated import DENSE, calibrated, correlated

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.experts.construction import ConstructionSettings, construct_layer
from megatron_l0moe.experts.unit_choice import (
    damped_cholesky,
    keep_by_obs,
    keep_by_svd,
    refit,
    relative_error,
)

FFN = DENSE[0]
DAMPING = 0.01
# both sides in float64, condition numbers of 1e4
FLOAT64_ATOL = 1e-8


def double_layer(seed=0):
    _, activations, fc2 = correlated(seed)
    activations, fc2 = activations.double(), fc2.double()
    return activations, fc2, activations.T @ activations


def naive_refit(activations, fc2, units, damping):
    """Least squares over the tokens, each output a problem of its own, the damping as further rows."""
    gram = activations.T @ activations
    weight = (damping * gram.diagonal().mean()).sqrt()
    kept = activations[:, units]
    table = torch.cat([kept, weight * torch.eye(len(units), dtype=torch.float64)])
    rows = []
    for w in fc2:
        wanted = torch.cat([activations @ w, weight * w[units]])
        rows.append(torch.linalg.lstsq(table, wanted[:, None], driver="gelsd").solution.flatten())
    return torch.stack(rows)


def naive_obs(activations, fc2, width, damping):
    """One unit at a time, the one after whose removal the change of W costs the least, all others fitted anew.

    The cost of a change D of W is trace(D (G + lambda I) D^T).
    """
    gram = activations.T @ activations
    damped = gram + damping * gram.diagonal().mean() * torch.eye(gram.shape[0], dtype=torch.float64)
    units = list(range(fc2.shape[1]))
    while len(units) > width:
        costs = []
        for r in units:
            kept = [j for j in units if j != r]
            gone = [j for j in range(fc2.shape[1]) if j not in kept]
            change = -fc2.clone()  # of the removed columns: to 0
            change[:, kept] = fc2[:, gone] @ damped[gone][:, kept] @ torch.linalg.inv(damped[kept][:, kept])
            costs.append(float((change @ damped * change).sum()))
        units.remove(units[costs.index(min(costs))])
    return units


def naive_svd(activations, fc2, width):
    """Forward selection over the tokens: the unit that leaves the least of the truncated output unexplained."""
    output = activations @ fc2.T
    u, d, v = torch.linalg.svd(output, full_matrices=False)
    rank = min(width, fc2.shape[0])
    target = u[:, :rank] * d[:rank] @ v[:rank]
    chosen = []
    for _ in range(width):
        left = []
        for j in range(fc2.shape[1]):
            kept = activations[:, [*chosen, j]]
            fitted = kept @ torch.linalg.lstsq(kept, target, driver="gelsd").solution
            left.append(float((target - fitted).square().sum()) if j not in chosen else float("inf"))
        chosen.append(left.index(min(left)))
    return sorted(chosen)


def error_of(activations, fc2, units, down):
    output = activations @ fc2.T
    return float((output - activations[:, units] @ down.T).square().sum() / output.square().sum())


def test_refit_equals_least_squares_over_the_tokens():
    activations, fc2, gram = double_layer()
    units = torch.tensor([1, 2, 5, 7, 11, 20])
    got = refit(fc2, gram, units, DAMPING)
    torch.testing.assert_close(
        got.down, naive_refit(activations, fc2, units, DAMPING), atol=FLOAT64_ATOL, rtol=0
    )
    assert (got.down - fc2[:, units]).abs().max() > 0.1  # control: it does move the weights
    error = relative_error(fc2, gram, units, got.down)
    assert error == pytest.approx(error_of(activations, fc2, units, got.down), rel=1e-9)
    assert error < error_of(activations, fc2, units, fc2[:, units])


def test_refit_by_hand():
    """Unit 1 is twice unit 0: without unit 1, unit 0's weight becomes 1 + 2 * 3, up to the damping."""
    gram = torch.tensor([[1.0, 2.0], [2.0, 4.0]]).double()
    fc2 = torch.tensor([[1.0, 3.0]]).double()
    assert float(refit(fc2, gram, torch.tensor([0]), 1e-12).down) == pytest.approx(7.0)
    # lambda = 0.4 * 2.5 = 1: 1 + 3 * 2 / (1 + 1)
    assert float(refit(fc2, gram, torch.tensor([0]), 0.4).down) == pytest.approx(4.0)


@pytest.mark.parametrize("block", [1, 3, 128])
def test_obs_equals_removing_one_by_one_with_a_new_fit_each_time(block):
    for seed in range(3):
        activations, fc2, gram = double_layer(seed)
        got = keep_by_obs(fc2, gram, 5, DAMPING, block=block)
        assert got.tolist() == naive_obs(activations, fc2, 5, DAMPING)


def test_obs_keeps_one_of_two_equal_units():
    """Both are large and either is free to lose; whoever looks at units one by one keeps both or none."""
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    activations[:, 1] = activations[:, 0]
    fc2 = torch.tensor([[5.0, 5.0, 1.0, 1.1]]).double()
    units = keep_by_obs(fc2, activations.T @ activations, 3, 1e-6, block=2).tolist()
    assert units in ([0, 2, 3], [1, 2, 3])


def test_svd_equals_forward_selection_over_the_tokens():
    for seed in range(3):
        activations, fc2, gram = double_layer(seed)
        for width in (3, 9):  # below and above H = 6
            assert keep_by_svd(fc2, gram, width).tolist() == naive_svd(activations, fc2, width)


def test_svd_fills_up_where_few_units_are_independent():
    activations, fc2, _ = double_layer()
    activations = activations[:, :2].repeat(1, FFN // 2)  # two signals only
    units = keep_by_svd(fc2, activations.T @ activations, 7).tolist()
    assert units == sorted(set(units))
    assert len(units) == 7


def test_order_of_the_methods_on_correlated_units():
    """Reconstruction error over the tokens: OBS and SVD <= magnitude <= about random."""
    errors = {method: [] for method in ("obs", "svd", "magnitude", "random")}
    for seed in range(5):
        inputs, activations, fc2 = correlated(seed)
        for method, found in errors.items():
            settings = ConstructionSettings(
                method=method,
                width=6,
                expert=0,
                num_experts=2,
                top_k=2,
                damping=DAMPING,
                shared=0.5,
                seed=seed,
            )
            made = construct_layer(settings, 0, calibrated(inputs, activations, method, fc2, 6), fc2)
            down = fc2[:, made.units] if made.down is None else made.down
            found.append(error_of(activations.double(), fc2.double(), made.units, down.double()))
            if made.numbers:
                assert made.numbers["relative_error"] == pytest.approx(found[-1], rel=1e-3, abs=1e-6)
    mean = {method: sum(found) / len(found) for method, found in errors.items()}
    assert mean["obs"] < 0.5 * mean["magnitude"]
    assert mean["svd"] < 0.5 * mean["magnitude"]
    assert mean["magnitude"] < 1.1 * mean["random"]
    assert all(o <= m for o, m in zip(errors["obs"], errors["magnitude"], strict=True))


def test_too_few_tokens_are_solved_by_damping_and_reported():
    inputs, activations, fc2 = correlated()
    few = slice(0, 4)  # of 24 units
    for method in ("obs", "svd"):
        settings = ConstructionSettings(
            method=method, width=8, expert=0, num_experts=2, top_k=2, damping=DAMPING, shared=0.5, seed=1
        )
        made = construct_layer(settings, 0, calibrated(inputs[few], activations[few], method, fc2, 8), fc2)
        assert made.down.isfinite().all()
        assert made.numbers["singular"] == 1.0
        whole = construct_layer(settings, 0, calibrated(inputs, activations, method, fc2, 8), fc2)
        assert whole.numbers["singular"] == 0.0


def test_damping_grows_where_rounding_needs_it():
    gram = torch.tensor([[1.0, 1.05], [1.05, 1.0]]).double()  # indefinite: eigenvalues 2.05 and -0.05
    with pytest.raises(L0MoEError, match=r"cannot be inverted with a damping of 1e-05; raise"):
        damped_cholesky(gram, 1e-9, 1.0)
    factor, used = damped_cholesky(gram, 1e-4, 1.0)
    assert used == pytest.approx(0.1)
    torch.testing.assert_close(
        factor @ factor.T, gram + 0.1 * torch.eye(2, dtype=torch.float64), atol=1e-12, rtol=0
    )
    with pytest.raises(L0MoEError, match="cannot be inverted"):
        damped_cholesky(gram * torch.nan, 1.0, 1.0)

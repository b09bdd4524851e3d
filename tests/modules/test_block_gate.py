"""DSMoE's gates: numbers worked by hand, then the naive reference in float64 with its gradients."""

import math

import equations
import pytest
import torch

from megatron_l0moe.modules.dsmoe import BlockGateConfig, block_weights, open_blocks, sparsity_loss

FLOAT64_ATOL = 1e-12  # the same few products in another order


def gated(scores: list[list[float]], threshold: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    return values, open_blocks(values, threshold)


def test_numbers_worked_by_hand():
    # two of four open, 0.5 is not above 0.5: factor 4 / 2; then four open: factor 1
    scores, is_open = gated([[0.8, 0.5, 0.6, 0.1], [0.9, 0.7, 0.6, 0.8]])
    assert is_open.tolist() == [[True, False, True, False], [True] * 4]
    weights = block_weights(scores, is_open)
    assert weights.tolist() == [[1.6, 0.0, 1.2, 0.0], [0.9, 0.7, 0.6, 0.8]]
    assert sparsity_loss(scores, is_open).item() == pytest.approx((0.8 + 0.6 + 0.9 + 0.7 + 0.6 + 0.8) / 8)


def test_every_score_gets_the_gradient_of_its_block_and_the_count_none():
    scores, is_open = gated([[0.8, 0.5, 0.6, 0.1]])
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((block_weights(scores, is_open) * upstream).sum(), scores)
    assert gradient.tolist() == [[2.0, 4.0, 6.0, 8.0]]
    without_estimator = torch.where(is_open, scores, 0.0) * 2  # control: eq. 7 alone
    (gradient,) = torch.autograd.grad((without_estimator * upstream).sum(), scores)
    assert gradient.tolist() == [[2.0, 0.0, 6.0, 0.0]]


def test_the_loss_lowers_open_blocks_only():
    scores, is_open = gated([[0.8, 0.5, 0.6, 0.1], [0.2, 0.2, 0.2, 0.9]])
    (gradient,) = torch.autograd.grad(sparsity_loss(scores, is_open), scores)
    assert gradient.tolist() == [[0.125, 0, 0.125, 0], [0, 0, 0, 0.125]]


def test_a_token_without_an_open_block_uses_its_highest_score():
    scores, is_open = gated([[0.2, 0.4, 0.4, 0.1], [0.0, 0.0, 0.0, 0.0]])  # ties go to the first
    assert is_open.tolist() == [[False, True, False, False], [True, False, False, False]]
    weights = block_weights(scores, is_open)
    assert weights.tolist() == [[0.0, 1.6, 0.0, 0.0], [0.0] * 4]
    (gradient,) = torch.autograd.grad(weights.sum() + sparsity_loss(scores, is_open), scores)
    assert gradient.tolist() == [[4.0, 4.125, 4.0, 4.0], [4.125, 4.0, 4.0, 4.0]]
    bare = (scores > 0.5).sum(
        dim=-1, keepdim=True
    )  # control: without the rule the paper's factor is infinite
    assert (4 / bare).isinf().all()


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.8, 0.999])
def test_naive_reference(threshold: float):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 4, 8, generator=generator, dtype=torch.float64)
    scores = torch.sigmoid(logits)
    is_open = open_blocks(scores, threshold)
    weights, loss = block_weights(scores, is_open), sparsity_loss(scores, is_open)
    (gradient,) = torch.autograd.grad((weights * upstream).sum() + loss, logits)
    rows = [equations.block_gates(row.tolist(), threshold) for row in logits.reshape(-1, 8)]
    assert torch.allclose(weights.reshape(-1, 8), torch.tensor([row.weights for row in rows]).double())
    assert loss.item() == pytest.approx(math.fsum(row.loss for row in rows) / len(rows), abs=FLOAT64_ATOL)
    expected = [
        row.gradient(up.tolist(), 1 / len(rows))
        for row, up in zip(rows, upstream.reshape(-1, 8), strict=True)
    ]
    difference = gradient.reshape(-1, 8) - torch.tensor(expected, dtype=torch.float64)
    assert difference.abs().max() < FLOAT64_ATOL
    assert (is_open.sum(-1) >= 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l0_blocks": 1}, "l0_blocks must be at least 2, got 1"),
        ({"l0_block_threshold": 1.0}, "l0_block_threshold must be at least 0 and below 1, got 1.0"),
        ({"l0_block_sparsity_coeff": -1.0}, "l0_block_sparsity_coeff must be at least 0"),
        ({"l0_block_init_std": 0.0}, "l0_block_init_std must be above 0"),
    ],
)
def test_wrong_settings_are_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        BlockGateConfig(**change)

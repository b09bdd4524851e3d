"""The MLP of DSMoE: hand-checkable reference first, then whole models against the dense one.

DSMoE's gates: numbers worked by hand, then the naive reference in float64 with its gradients.
"""

import math

import equations
import megatron_models as models
import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_l0moe.modules import dsmoe
from megatron_l0moe.modules.dsmoe import (
    BlockGateConfig,
    DSMoEMLP,
    block_weights,
    local_segments,
    open_blocks,
    sparsity_loss,
)
from megatron_l0moe.runtime import cpu

FLOAT32_SUM_ATOL = 2e-6  # sums of 24 float32 products of size 1, in another order
IDENTITY_ATOL = 1e-5  # three layers of float32 sums in another order, logits of size 1
BLOCKS = 8


@pytest.fixture(autouse=True)
def process_group():
    with cpu.one_process_group():
        torch.manual_seed(0)
        yield


def gated_layers(model: torch.nn.Module) -> list[DSMoEMLP]:
    return [module for module in model.modules() if isinstance(module, DSMoEMLP)]


def spread(mlp: DSMoEMLP) -> None:
    """Give the gates scores far from the threshold on both sides."""
    mlp.block_gate.weight.data.mul_(50.0)


def test_only_layers_above_the_dense_ones_are_gated_and_share_the_loss():
    layers = gated_layers(models.build("dsmoe"))
    assert [mlp.block_gate.layer for mlp in layers] == [1, 2]
    assert [mlp.block_gate.gated_layers for mlp in layers] == [2, 2]


def test_sum_of_all_blocks_with_gates_at_one_is_the_dense_model_exactly(monkeypatch):
    dense, blocks = models.build("dense"), models.build("dsmoe")
    models.copy_backbone(dense, blocks)
    shut: list[int] = []

    def scores(gate, hidden_states):
        values = torch.ones(*hidden_states.shape[:-1], BLOCKS)
        values[..., shut] = 0.0
        return values

    monkeypatch.setattr(dsmoe.BlockGate, "scores", scores)
    assert torch.equal(models.logits(dense), models.logits(blocks))
    shut.append(3)  # control: one block fewer
    assert not torch.allclose(models.logits(dense), models.logits(blocks), atol=IDENTITY_ATOL)


def test_output_is_the_weighted_sum_of_the_open_blocks():
    mlp = gated_layers(models.build("dsmoe"))[0]
    spread(mlp)
    x = torch.randn(5, 1, models.HIDDEN)
    output, _ = mlp(x)
    gate, up = mlp.linear_fc1.weight.double().chunk(2)
    down = mlp.linear_fc2.weight.double()
    width = models.FFN // BLOCKS

    def expected(row: list[float], shift: int) -> list[float]:
        logits = [sum(w * v for w, v in zip(y, row, strict=True)) for y in mlp.block_gate.weight.tolist()]
        total = [0.0] * models.HIDDEN
        for block, weight in enumerate(equations.block_gates(logits, 0.5).weights):
            units = [(block * width + shift + unit) % models.FFN for unit in range(width)]
            part = equations.swiglu(row, gate[units].tolist(), up[units].tolist(), down[:, units].tolist())
            total = [t + weight * value for t, value in zip(total, part, strict=True)]
        return total

    rows = x[:, 0].double().tolist()
    right, wrong = (torch.tensor([expected(row, shift) for row in rows]) for shift in (0, 1))
    assert torch.allclose(output[:, 0], right, atol=FLOAT32_SUM_ATOL)
    assert not torch.allclose(
        output[:, 0], wrong, atol=FLOAT32_SUM_ATOL
    )  # control: blocks begin one unit later


def test_a_closed_block_has_no_gradient_but_its_gate_has():
    mlp = gated_layers(models.build("dsmoe"))[0].train()
    with torch.no_grad():  # a score of 0.98 for the first block and of 0.02 for all others
        mlp.block_gate.weight.copy_(torch.tensor([4.0] + [-4.0] * 7)[:, None] / models.HIDDEN)
    output, _ = mlp(torch.ones(2, 1, models.HIDDEN))
    output.square().sum().backward()
    width = models.FFN // BLOCKS
    down, up = mlp.linear_fc2.weight.grad, mlp.linear_fc1.weight.grad[models.FFN :]
    assert down[:, width:].abs().max() == 0 == up[width:].abs().max()
    assert down[:, :width].abs().max() > 0 < up[:width].abs().max()
    assert (mlp.block_gate.weight.grad.abs().amax(dim=1) > 0).all()


def test_the_loss_reaches_the_gates_with_its_coefficient_and_scale():
    mlp = gated_layers(models.build("dsmoe"))[0].train()
    spread(mlp)
    gate = mlp.block_gate
    mlp.linear_fc2.weight.data.zero_()  # leaves the loss's gradient alone
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(0.25))
    x = torch.randn(6, 1, models.HIDDEN)
    output, _ = mlp(x)
    output.sum().backward()
    scores = gate.scores(x)
    open_scores = torch.where(scores > 0.5, scores, torch.zeros(()))
    (expected,) = torch.autograd.grad(open_scores.mean() / 2, gate.weight)  # two gated layers
    assert torch.allclose(gate.weight.grad, 0.25 * expected, atol=1e-8)
    assert expected.abs().max() > 1e-3
    active, loss, tokens = gate.sums.tolist()
    assert tokens == 6
    assert active == pytest.approx(float((scores > 0.5).sum()) / BLOCKS)
    assert loss == pytest.approx(6 * float(open_scores.mean()))
    with torch.no_grad():
        mlp(x)
    assert gate.sums[2] == 6  # the first pass of a recomputation does not count


def test_the_loss_alone_closes_blocks_down_to_one():
    mlp = gated_layers(models.build("dsmoe"))[0].train()
    mlp.linear_fc2.weight.data.zero_()
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    optimizer = torch.optim.Adam(mlp.block_gate.parameters(), lr=0.05)
    x = 1.0 + torch.randn(64, 1, models.HIDDEN)  # gates have no bias: they close along the mean
    shares = []
    for _ in range(40):
        mlp.block_gate.begin_iteration()
        optimizer.zero_grad()
        mlp(x)[0].sum().backward()
        optimizer.step()
        active, _, tokens = mlp.block_gate.sums.tolist()
        shares.append(active / tokens)
    assert shares[0] > 0.4
    assert 1 / BLOCKS <= shares[-1] < 0.7 * shares[0]


def test_blocks_go_with_the_channels_in_every_tensor_parallel_size():
    assert local_segments(24, 8, rank=0, ranks=1) == list(range(8))
    assert local_segments(24, 8, rank=1, ranks=2) == [4, 5, 6, 7]
    assert local_segments(24, 3, rank=1, ranks=2) == [1, 2, 2]  # channels 12-15, 16-19, 20-23
    assert local_segments(48, 2, rank=2, ranks=4) == [1]


def test_checkpoint_keys_are_the_dense_ones_and_the_gates():
    def keys(stage: str) -> set[str]:
        state = models.build(stage).sharded_state_dict()
        return {entry.key for entry in state.values() if "_extra_state" not in entry.key}

    gates = {f"decoder.layers.{layer}.mlp.block_gate.weight" for layer in (1, 2)}
    assert keys("dsmoe") - keys("dense") == gates
    assert keys("dense") - keys("dsmoe") == set()


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

"""The MLP of DSMoE: hand-checkable reference first, then whole models against the dense one."""

import equations
import megatron_models as models
import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_l0moe.modules import dsmoe
from megatron_l0moe.modules.dsmoe import DSMoEMLP, local_segments
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

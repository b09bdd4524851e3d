"""The gated MLP: hand-checkable reference first, then whole models (invariant 1 of the design)."""

import equations
import megatron_models as models
import pytest
import torch

from megatron_l0moe.modules import l0_mlp as lm
from megatron_l0moe.modules.l0_mlp import L0MLP
from megatron_l0moe.modules.retention import GateStep, Phase, schedule_step
from megatron_l0moe.runtime import cpu

FLOAT32_SUM_ATOL = 2e-6  # sums of 24 float32 products of size 1, in another order
IDENTITY_ATOL = 1e-5  # three layers of float32 sums in another order, logits of size 1


@pytest.fixture(autouse=True)
def process_group():
    with cpu.one_process_group():
        torch.manual_seed(0)
        yield


def gated_layers(model: torch.nn.Module) -> list[L0MLP]:
    return [module for module in model.modules() if isinstance(module, L0MLP)]


def freeze(mlp: L0MLP, units: list[int]) -> None:
    """Put a hard mask in force that keeps the given channels."""
    mlp.gate.hard_mask.zero_()
    mlp.gate.hard_mask[units] = 1.0
    mlp.gate.frozen.fill_(1)
    mlp.gate.step = GateStep(iteration=0, phase=Phase.FROZEN, retention=0.5, penalty_scale=1.0)


def test_only_layers_above_the_dense_ones_are_gated():
    model = models.build("expert")
    assert [mlp.gate.layer for mlp in gated_layers(model)] == [1, 2]


def test_mask_of_all_ones_is_the_dense_model_exactly():
    dense, gated = models.build("dense"), models.build("expert")
    models.copy_backbone(dense, gated)
    for mlp in gated_layers(gated):
        freeze(mlp, list(range(models.FFN)))
    assert torch.equal(models.logits(dense), models.logits(gated))
    freeze(gated_layers(gated)[0], list(range(models.FFN - 1)))  # control: one unit fewer
    assert not torch.allclose(models.logits(dense), models.logits(gated), atol=IDENTITY_ATOL)


def test_masked_mlp_equals_the_expert_that_is_cut_out_of_it():
    mlp = gated_layers(models.build("expert"))[0]
    units = [0, 3, 4, 11, 17, 20, 22, 23]
    freeze(mlp, units)
    x = torch.randn(5, 1, models.HIDDEN)
    output, _ = mlp(x)
    gate, up = mlp.linear_fc1.weight.double().chunk(2)
    down = mlp.linear_fc2.weight.double()
    expert = (gate[units].tolist(), up[units].tolist(), down[:, units].tolist())
    expected = [equations.swiglu(row, *expert) for row in x[:, 0].double().tolist()]
    assert torch.allclose(output[:, 0].double(), torch.tensor(expected).double(), atol=FLOAT32_SUM_ATOL)
    swapped = (expert[1], expert[0], expert[2])  # control: gate and up exchanged
    wrong = [equations.swiglu(row, *swapped) for row in x[:, 0].double().tolist()]
    assert not torch.allclose(output[:, 0].double(), torch.tensor(wrong).double(), atol=FLOAT32_SUM_ATOL)


def test_penalty_reaches_log_alpha_and_lambdas_with_its_scale():
    model = models.build("expert").train()
    mlp = gated_layers(model)[0]
    gate = mlp.gate
    gate.controller.lambdas.data.copy_(torch.tensor([0.3, 0.7]))
    config = gate.controller.retention_config
    gate.begin_iteration(schedule_step(config, iteration=8, total=20, target=1 / 3, penalty_scale=0.25))
    output, _ = mlp(torch.zeros(2, 1, models.HIDDEN))  # a zero input leaves the penalty's gradient alone
    output.sum().backward()
    expected_alpha = torch.autograd.grad(gate.penalty(gate()), gate.log_alpha, retain_graph=True)[0]
    assert torch.allclose(gate.log_alpha.grad, 0.25 * expected_alpha, atol=1e-9)
    assert gate.log_alpha.grad.abs().max() > 0
    difference = gate.expected_retention() - gate.step.retention
    assert gate.controller.lambdas.grad.tolist() == pytest.approx([-0.25 * difference, -0.25 * difference**2])


def test_gate_product_and_its_gradients_are_those_of_autograd():
    """With the product kept instead of the activation; gates that are shut, half open, almost shut and open."""
    generator = torch.Generator().manual_seed(0)
    upstream, start = (torch.randn(5, 2, 6, generator=generator) for _ in range(2))
    raw = torch.tensor([-0.05, 1e-6, 0.3, 0.9, 0.999, 1.08])  # eq. 1 before its clip
    results = []
    for product in (lm._ApplyGate.apply, torch.mul):
        activation, stretched = start.clone().requires_grad_(), raw.clone().requires_grad_()
        output = product(activation, stretched.clamp(0.0, 1.0))
        results.append([output, *torch.autograd.grad((output * upstream).sum(), (activation, stretched))])
    for ours, reference in zip(*results, strict=True):
        assert torch.allclose(ours, reference, atol=FLOAT32_SUM_ATOL, rtol=0)
    assert results[0][2][[0, 5]].tolist() == [0, 0]
    assert results[0][2][1:5].abs().min() > 100 * FLOAT32_SUM_ATOL  # the gradient that is compared is there


def saved_values(module: torch.nn.Module) -> int:
    """Values that autograd keeps for the backward pass, each storage once, parameters left out."""
    own, found = {p.data_ptr() for p in module.parameters()}, {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output, _ = module(torch.randn(50, 1, models.HIDDEN, requires_grad=True))
    output.sum().backward()
    return sum(size for pointer, size in found.items() if pointer not in own)


def test_a_learning_gate_keeps_no_activation_of_its_own(monkeypatch):
    dense = models.build("dense").train().decoder.layers[1].mlp
    mlp = gated_layers(models.build("expert").train())[0]
    mlp.gate.begin_iteration(
        schedule_step(mlp.gate.controller.retention_config, iteration=8, total=20, target=1 / 3)
    )
    stock, gated = saved_values(dense), saved_values(mlp)
    assert gated - stock < 50 * models.FFN  # vectors of F only
    monkeypatch.setattr(lm._ApplyGate, "apply", torch.mul)  # control: autograd's own product
    assert saved_values(mlp) - stock >= 50 * models.FFN


def test_evaluation_uses_the_gate_without_noise():
    model = models.build("expert").eval()
    assert torch.equal(models.logits(model), models.logits(model))
    mlp = gated_layers(model)[0]
    mlp.gate.log_alpha.data.fill_(-8.0)  # sigmoid(-8 / 0.83) stretched is below 0: all gates shut
    output, _ = mlp(torch.randn(2, 1, models.HIDDEN))
    assert torch.equal(output, torch.zeros_like(output))


def test_identical_full_width_experts_are_the_dense_model():
    dense, moe = models.build("dense").eval(), models.build("moe", experts=3).eval()  # records no metrics
    models.copy_backbone(dense, moe)
    for index in range(models.DENSE, models.LAYERS):
        source, target = dense.decoder.layers[index].mlp, moe.decoder.layers[index].mlp
        moe.decoder.layers[index].pre_mlp_layernorm.load_state_dict(
            dense.decoder.layers[index].pre_mlp_layernorm.state_dict()
        )
        for expert in target.experts.local_experts:
            expert.linear_fc1.weight.data.copy_(source.linear_fc1.weight)
            expert.linear_fc2.weight.data.copy_(source.linear_fc2.weight)
    difference = (models.logits(dense) - models.logits(moe)).abs().max()
    assert difference < IDENTITY_ATOL
    moe.decoder.layers[1].mlp.experts.local_experts[0].linear_fc2.weight.data.mul_(1.1)  # control
    assert (models.logits(dense) - models.logits(moe)).abs().max() > IDENTITY_ATOL


def test_checkpoint_keys_are_those_of_the_converter():
    def keys(stage: str) -> set[str]:
        model = models.build(stage)
        return {entry.key for entry in model.sharded_state_dict().values() if "_extra_state" not in entry.key}

    dense, expert, moe = keys("dense"), keys("expert"), keys("moe")
    assert "decoder.layers.2.mlp.linear_fc1.layer_norm_weight" in dense & expert
    assert {key for key in expert - dense if ".gate." not in key} == set()
    assert dense - expert == set()
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in moe
    assert "decoder.layers.1.pre_mlp_layernorm.weight" in moe
    assert "decoder.layers.1.mlp.experts.experts.linear_fc1.weight" in moe
    assert "decoder.layers.1.mlp.router.weight" in moe

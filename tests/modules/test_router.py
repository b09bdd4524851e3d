"""Eq. 3: by hand, against the reference, its gradient, and the counts that it uses.

Counts by domain and expert, by hand, and when nothing is counted.
"""

import functools

import equations
import pytest
import torch
from torch import Tensor

from megatron_l0moe.modules import router as rt
from megatron_l0moe.modules.router import DomainLoad
from megatron_l0moe.runtime import cpu

FLOAT32_ATOL = 1e-6  # a handful of float32 roundings of values near 1


def test_balance_loss_by_hand():
    # 8 tokens, top-2, K = 4: counts 8, 4, 4, 0 -> 0.5, 0.25, 0.25, 0: (1/4)^2 + 0 + 0 + (1/4)^2 = 0.125
    load = torch.tensor([0.5, 0.25, 0.25, 0.0])
    value = rt.balance_loss(load, torch.full((4,), 0.25))
    assert value.item() == pytest.approx(0.125)
    assert value.item() == pytest.approx(equations.balance_loss([8, 4, 4, 0], top_k=2, tokens=8))
    assert rt.balance_loss(torch.full((4,), 0.25), load).item() == 0.0  # perfect balance costs nothing


def test_balance_gradient_goes_through_the_mean_probability():
    load = torch.tensor([0.5, 0.25, 0.25, 0.0])
    probability = torch.full((4,), 0.25, requires_grad=True)
    rt.balance_loss(load, probability).backward()
    assert probability.grad.tolist() == pytest.approx([0.5, 0.0, 0.0, -0.5])  # 2 (c_i / kB - 1 / N)


def test_balance_gradient_is_two_over_n_times_switch():
    # Fedus et al., 2022: N * sum f_i P_i, whose gradient is N f_i; both act on a simplex, so compare centred
    load = torch.tensor([0.4, 0.3, 0.2, 0.1])
    probability = torch.full((4,), 0.25, requires_grad=True)
    (ours,) = torch.autograd.grad(rt.balance_loss(load, probability), probability)
    (switch,) = torch.autograd.grad(4 * (load * probability).sum(), probability)
    assert torch.allclose(ours - ours.mean(), (switch - switch.mean()) * 2 / 4, atol=FLOAT32_ATOL)


@pytest.mark.parametrize("form", ["squared", "printed"])
def test_z_loss_equals_reference(form):
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    expected = equations.z_loss(logits.double().tolist(), squared=form == "squared")
    assert rt.z_loss(logits, form).item() == pytest.approx(expected, abs=FLOAT32_ATOL)
    other = equations.z_loss(logits.double().tolist(), squared=form != "squared")
    assert rt.z_loss(logits, form).item() != pytest.approx(other, abs=1e-3)  # control


@pytest.fixture
def build():
    with cpu.one_process_group():
        yield build_router


def build_router(**settings) -> rt.L0Router:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    coefficients = {"moe_aux_loss_coeff": 0.01, "moe_z_loss_coeff": None, **settings.pop("config", {})}
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_router_load_balancing_type="none",
        use_cpu_initialization=True,
        **coefficients,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    router = rt.L0Router(config, pg_collection=groups, router_config=rt.RouterConfig(**settings))
    router.set_layer_number(1)
    return router.train()


def aux_gradient(router: rt.L0Router, logits: torch.Tensor) -> torch.Tensor:
    """The gradient of the attached losses alone: the gate weights themselves get none."""
    logits = logits.clone().requires_grad_()
    probs, _ = router.routing(logits)
    probs.backward(torch.zeros_like(probs))
    return logits.grad


def test_gate_weights_are_a_softmax_over_the_selected_two(build):
    logits = torch.tensor([[[0.0, 1.0, 2.0, 3.0]]])
    probs, routing_map = build().routing(logits)
    assert routing_map.tolist() == [[False, False, True, True]]
    assert probs[0, 2:].tolist() == pytest.approx(torch.softmax(torch.tensor([2.0, 3.0]), 0).tolist())


def test_global_scope_uses_the_last_global_batch_whatever_the_micro_batches_are(build):
    logits = torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(1))
    whole, split = build(), build()
    for router, parts in ((whole, [logits]), (split, list(logits.split(1, dim=1)))):
        for part in parts:
            aux_gradient(router, part)
        router.expert_load.begin_iteration()
    assert torch.equal(whole.expert_load.load, split.expert_load.load)
    assert whole.expert_load.load.sum().item() == pytest.approx(1.0)
    together = aux_gradient(whole, logits)
    apart = torch.cat([aux_gradient(split, part) for part in logits.split(1, dim=1)], dim=1) / 4
    assert torch.allclose(together, apart, atol=1e-8)  # a mean of means over equal parts
    assert together.abs().max() > 1e-5  # control: there is a gradient to compare


def test_attached_gradient_equals_that_of_the_formula(build):
    router = build(l0_balance_scope="micro_batch")
    logits = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(2))
    attached = aux_gradient(router, logits)
    x = logits.clone().requires_grad_()
    counts = torch.zeros(4).scatter_add_(0, x.reshape(-1, 4).topk(2).indices.reshape(-1), torch.ones(20))
    loss = 0.01 * rt.balance_loss(counts / 20, torch.softmax(x.reshape(-1, 4), -1).mean(0))
    (expected,) = torch.autograd.grad(loss, x)
    assert torch.allclose(attached, expected, atol=1e-8)


@pytest.mark.parametrize("form", ["squared", "printed"])
def test_z_loss_is_attached_with_megatrons_coefficient(build, form):
    router = build(l0_z_loss=form, config={"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.003})
    logits = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(3))
    x = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(0.003 * rt.z_loss(x.reshape(-1, 4), form), x)
    assert torch.allclose(aux_gradient(router, logits), expected, atol=1e-8)


def test_counts_are_not_taken_without_gradient(build):
    router = build()
    with torch.no_grad():
        router.routing(torch.randn(3, 1, 4))
    router.eval()
    router.routing(torch.randn(3, 1, 4))
    assert router.expert_load.counts.sum() == 0


def test_builder_is_a_partial_that_megatron_can_call():
    builder = functools.partial(rt.L0Router, router_config=rt.RouterConfig())
    assert builder.func is rt.L0Router


# 2 positions of 3 sequences, in Megatron's order [s, b]; top 1 of 4 experts
EXPERTS = [0, 1, 1, 0, 2, 3]


def routing_map() -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(EXPERTS), 4).bool()


def test_counts_by_hand() -> None:
    load = DomainLoad()
    load.begin_iteration(3, 4, cpu.device())
    load.domains = torch.tensor([2, 0, 2])
    load.add(routing_map())
    # sequences 0 and 2, of domain 2: experts 0, 0 and 1, 3; sequence 1, of domain 0: experts 1, 2
    expected = [[0, 1, 1, 0], [0, 0, 0, 0], [2, 1, 0, 1]]
    assert load.counts is not None
    assert load.counts.tolist() == expected
    load.add(routing_map())
    assert load.counts.tolist() == [[2 * n for n in row] for row in expected]
    load.begin_iteration(3, 4, cpu.device())
    assert load.counts.sum() == 0


def test_nothing_is_counted_outside_a_forward_pass_or_a_step() -> None:
    load = DomainLoad()
    load.domains = torch.tensor([0, 0, 0])
    load.add(routing_map())
    assert load.counts is None
    load.begin_iteration(1, 4, cpu.device())
    load.domains = None  # a recomputation
    load.add(routing_map())
    assert load.counts is not None
    assert load.counts.sum() == 0

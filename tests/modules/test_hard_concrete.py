"""Eq. 1: numbers worked by hand, then the float64 reference, then the properties that the layout proof rests on."""

import math

import equations
import pytest
import torch

from megatron_l0moe.modules import hard_concrete as hc
from megatron_l0moe.modules.retention import RetentionConfig, schedule_step
from megatron_l0moe.runtime import cpu

CONFIG = hc.HardConcreteConfig()
B, GAMMA, ZETA = 0.83, -0.1, 1.1
FLOAT32_ATOL = 1e-6  # one float32 rounding of values in [0, 1], a few operations deep


def test_gate_by_hand_at_the_median_of_the_noise():
    # u = 1/2, log_alpha = 0: s = 1/2, stretched 0.5 * 1.2 - 0.1 = 0.5
    z = hc.sample_gate(torch.zeros(1), torch.full((1,), 0.5), CONFIG)
    assert z.item() == pytest.approx(0.5, abs=FLOAT32_ATOL)


def test_gate_by_hand_for_a_known_sigmoid():
    # (log u - log(1 - u) + log_alpha) / b = ln 3 gives s = 3/4, stretched 0.75 * 1.2 - 0.1 = 0.8
    log_alpha = torch.tensor([B * math.log(3.0)])
    z = hc.sample_gate(log_alpha, torch.full((1,), 0.5), CONFIG)
    assert z.item() == pytest.approx(0.8, abs=FLOAT32_ATOL)


def test_gate_reaches_exact_zero_and_exact_one():
    z = hc.sample_gate(torch.tensor([-10.0, 4.6]), torch.tensor([0.5, 0.9]), CONFIG)
    assert z.tolist() == [0.0, 1.0]


def test_gates_equal_the_reference():
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(200, generator=generator).clamp(1e-6, 1 - 1e-6)
    log_alpha = torch.empty(200).uniform_(-10, 4.6, generator=generator)
    z = hc.sample_gate(log_alpha, u, CONFIG).double()
    expected = [
        equations.hard_concrete(x, a, b=B, gamma=GAMMA, zeta=ZETA)
        for x, a in zip(u.double().tolist(), log_alpha.double().tolist(), strict=True)
    ]
    assert torch.allclose(z, torch.tensor(expected, dtype=torch.float64), atol=FLOAT32_ATOL, rtol=0)
    other = [
        equations.hard_concrete(x, a, b=2 / 3, gamma=GAMMA, zeta=ZETA)
        for x, a in zip(u.double().tolist(), log_alpha.double().tolist(), strict=True)
    ]
    assert not torch.allclose(
        z, torch.tensor(other, dtype=torch.float64), atol=1e-3, rtol=0
    )  # control: another b


def test_expected_l0_equals_reference_and_frequency():
    log_alpha = torch.tensor([-3.0, -1.0, 0.0, 2.0])
    p = hc.open_probability(log_alpha, CONFIG)
    expected = [equations.open_probability(a, b=B, gamma=GAMMA, zeta=ZETA) for a in log_alpha.tolist()]
    assert p.tolist() == pytest.approx(expected, abs=FLOAT32_ATOL)
    # at log_alpha = b log(-gamma / zeta) the stretched sample exceeds 0 for exactly half of the noise
    half = torch.tensor([B * math.log(0.1 / 1.1)])
    assert hc.open_probability(half, CONFIG).item() == pytest.approx(0.5, abs=FLOAT32_ATOL)
    u = (torch.arange(20000) + 0.5) / 20000
    frequency = torch.stack(
        [(hc.sample_gate(a.expand(20000), u, CONFIG) > 0).float().mean() for a in log_alpha]
    )
    assert torch.allclose(frequency, p, atol=1e-3)


def test_a_lower_clamp_of_minus_4_6_leaves_7_percent_out_of_reach():
    closed = hc.open_probability(torch.tensor([-4.6]), CONFIG).item()
    kept = 1024 / 14336
    assert kept + (1 - kept) * closed > 0.13  # the paper's 7.1 percent plus what "closed" gates still count
    closed = hc.open_probability(torch.tensor([CONFIG.l0_log_alpha_min]), CONFIG).item()
    assert kept + (1 - kept) * closed < 0.072


def test_noise_depends_on_seed_iteration_and_layer_only():
    def draw(**changes: int) -> torch.Tensor:
        key = {"seed": 7, "iteration": 3, "layer": 5, **changes}
        return hc.gate_noise(**key, size=64, device=torch.device("cpu"))

    torch.manual_seed(0)
    first = draw()
    torch.manual_seed(1)
    assert torch.equal(first, draw())  # the global generator plays no part
    for change in ({"seed": 8}, {"iteration": 4}, {"layer": 6}):
        assert not torch.equal(first, draw(**change))
    assert first.min() > 0
    assert first.max() < 1


def test_top_k_mask_ties_go_to_the_lower_index():
    mask = hc.top_k_mask(torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0]), 3)
    assert mask.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l0_temperature": 0.0}, "l0_temperature must be above 0, got 0.0"),
        ({"l0_stretch_low": 0.1}, "l0_stretch_low must be below 0 .* got 0.1"),
        ({"l0_stretch_high": 1.0}, "l0_stretch_high must be above 1 .* got 1.0"),
        ({"l0_log_alpha_min": 5.0}, r"l0_log_alpha_min \(5.0\) must be below l0_log_alpha_max \(4.6\)"),
    ],
)
def test_bad_settings_name_the_value_and_the_rule(change, message):
    with pytest.raises(ValueError, match=message):
        hc.HardConcreteConfig(**change)


@pytest.fixture
def gate():
    with cpu.one_process_group():
        yield build_gate()


def build_gate(**retention) -> hc.HardConcreteGate:
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
    return hc.HardConcreteGate(
        config,
        gate_config=CONFIG,
        retention_config=RetentionConfig(
            **{"l0_expert_ffn": 3, "l0_retention_control": "lagrangian", **retention}
        ),
        layer=2,
        local_width=8,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
    )


def step(gate: hc.HardConcreteGate, iteration: int) -> None:
    config = gate.controller.retention_config
    gate.begin_iteration(schedule_step(config, iteration=iteration, total=20, target=gate.controller.target))


def test_gate_is_open_then_sampled_then_frozen_at_exact_size(gate):
    step(gate, 0)
    assert gate().tolist() == [1.0] * 8
    assert gate.penalty(gate()) is None
    step(gate, 5)
    assert torch.equal(gate(), gate())  # the same noise again, as under recomputation
    assert gate.penalty(gate()) is not None
    gate.log_alpha.data.copy_(torch.tensor([0.0, 5.0, 1.0, 2.0, 3.0, -1.0, -2.0, 2.0]))
    step(gate, 18)
    assert gate().tolist() == [0, 1, 0, 1, 1, 0, 0, 0]  # 4.6 (clamped), 3, and the first of the two 2s
    gate.log_alpha.data.neg_()
    step(gate, 19)
    assert gate().tolist() == [0, 1, 0, 1, 1, 0, 0, 0]  # frozen: later steps of the optimizer change nothing
    assert gate.expected_retention() == pytest.approx(3 / 8)


def test_log_alpha_is_projected_into_its_bounds(gate):
    gate.log_alpha.data.copy_(torch.linspace(-20, 20, 8))
    step(gate, 5)
    assert gate.log_alpha.detach().clamp(-10.0, 4.6).equal(gate.log_alpha.detach())
    assert gate.log_alpha[0].item() == -10.0


def test_router_input_mean_is_that_of_the_open_steps(gate):
    first, second = torch.randn(3, 2, 4), torch.randn(5, 1, 4)
    for iteration, hidden in ((0, first), (1, second), (9, torch.full((3, 2, 4), 100.0))):
        step(gate, iteration)
        gate.observe_input(hidden)
    expected = torch.cat([first.reshape(-1, 4), second.reshape(-1, 4)]).double().mean(0).float()
    assert gate.input_count.item() == 11
    assert torch.allclose(gate.input_mean, expected, atol=FLOAT32_ATOL)


def test_gate_keeps_float32_when_the_model_is_cast(gate):
    gate.log_alpha.data.fill_(1.2345678)
    gate.to(torch.bfloat16)
    assert gate.log_alpha.dtype == torch.float32
    assert gate.controller.lambdas.dtype == torch.float32
    assert gate.log_alpha[0].item() == pytest.approx(1.2345678, abs=1e-7)  # no detour through bf16 either


def test_checkpoint_holds_the_whole_state(gate):
    from megatron.core import parallel_state

    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = gate.sharded_state_dict("mlp.gate.", metadata=metadata)
    assert {key.removeprefix("mlp.gate.") for key in state} == {
        "log_alpha",
        "controller.lambdas",
        "hard_mask",
        "frozen",
        "input_mean",
        "input_count",
    }

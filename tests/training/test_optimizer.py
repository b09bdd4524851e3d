"""What the optimizers of the stages really hold: parameters, state, gradient buffers, rates, decay and clip.

Looked at in the optimizer and in DDP's buffers after real steps, for the plain and the distributed optimizer, in
float32 and bf16; not at `requires_grad`.
"""

from dataclasses import dataclass
from typing import Any

import megatron_models as models
import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from megatron_l0moe.runtime import cpu
from megatron_l0moe.training import model as tm
from megatron_l0moe.training.arguments import JobSettings, StageConfig
from megatron_l0moe.training.model import group_overrides

LR, MASK_LR, LAMBDA_LR, DECAY, BETA1 = 1e-3, 0.3, 0.2, 0.1, 0.9
PARAMETER_START = (
    64  # core/optimizer/param_layout.py: with the distributed optimizer parameters start at multiples
)
ADAM_EPS_RTOL = 1e-4  # the first step of Adam is the rate itself, but for eps and float32


@pytest.fixture(autouse=True)
def process_group():
    with cpu.one_process_group():
        torch.manual_seed(0)
        yield


@dataclass
class Job:
    """A wrapped model and its optimizer, with the optimizer's tensors by parameter name."""

    network: Any
    wrapped: Any
    optimizer: Any

    @property
    def names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self.network.named_parameters()}

    def step(self, gradients: dict[str, float] | None = None) -> float:
        """Make one step with constant gradients by the last part of the name, 1 where none is given."""
        for name, parameter in self.network.named_parameters():
            if hasattr(parameter, "main_grad"):
                parameter.main_grad.fill_((gradients or {}).get(name.rsplit(".", 1)[-1], 1.0))
        _, norm, _ = self.optimizer.step()
        return norm

    def held(self) -> dict[str, tuple[torch.Tensor, dict, dict]]:
        """Return main parameter, state and group of everything that the inner optimizers step."""
        held = {}
        for part in self.optimizer.chained_optimizers:
            for group, own in zip(part.optimizer.param_groups, self._model_groups(part), strict=True):
                assert len(group["params"]) == len(own)
                for main, parameter in zip(group["params"], own, strict=True):
                    name = self.names[id(parameter)]
                    assert name not in held
                    held[name] = (main, part.optimizer.state[main], group)
        return held

    def _model_groups(self, part: Any) -> list[list[torch.nn.Parameter]]:
        if hasattr(part, "model_float16_groups"):  # distributed
            pairs = zip(part.model_fp32_groups, part.model_float16_groups, strict=True)
        elif hasattr(part, "float16_groups"):
            pairs = zip(part.fp32_from_fp32_groups, part.float16_groups, strict=True)
        else:
            return [group["params"] for group in part.optimizer.param_groups]
        return [[*full, *half] for full, half in pairs]

    def buffered(self) -> list[str]:
        buffers = self.wrapped.buffers + self.wrapped.expert_parallel_buffers
        return [self.names[id(parameter)] for buffer in buffers for parameter in buffer.params]


@pytest.fixture(params=["fp32", "bf16"])
def half(request) -> bool:
    return request.param == "bf16"


@pytest.fixture(params=["plain", "distributed"])
def distributed(request) -> bool:
    return request.param == "distributed"


def job(stage: str, half: bool, distributed: bool, *, thaw: str = "", decay: float = 0.0) -> Job:
    """Build a job as the training program does; `thaw` names a parameter that is trained by mistake."""
    plan = models.plan(stage)
    network = models.build(stage, layer_plan=plan)
    config = StageConfig(
        l0_stage=stage, l0_dense_layers=models.DENSE, l0_mask_lr=MASK_LR, l0_lambda_lr=LAMBDA_LR
    )
    tm.prepare_for_training([network], JobSettings(config, plan))
    if thaw:
        network.get_parameter(thaw).requires_grad_(True)
    network.config.bf16 = half
    model = Float16Module(network.config, network) if half else network
    buckets = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(network.config, buckets, model)
    options = OptimizerConfig(
        optimizer="adam", lr=LR, weight_decay=decay, clip_grad=1.0, bf16=half, adam_beta1=BETA1,
        params_dtype=torch.bfloat16 if half else torch.float32, use_distributed_optimizer=distributed,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(options, [wrapped], config_overrides=group_overrides(config))
    OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=LR, min_lr=0.0, lr_warmup_steps=0, lr_decay_steps=10, lr_decay_style="constant",
        start_wd=decay, end_wd=decay, wd_incr_steps=10, wd_incr_style="constant",
    )  # fmt: skip
    return Job(network, wrapped, optimizer)


def trained_names() -> set[str]:
    return {
        f"decoder.layers.{layer}.mlp.{name}"
        for layer in range(models.DENSE, models.LAYERS)
        for name in ("linear_fc1.weight", "linear_fc2.weight", "gate.log_alpha", "gate.controller.lambdas")
    }


def test_frozen_parameters_have_no_state_and_no_buffer(half, distributed):
    made = job("expert", half, distributed)
    sizes = {name: parameter.numel() for name, parameter in made.network.named_parameters()}
    made.step()
    held = made.held()
    assert set(held) == trained_names() < set(sizes)
    for name, (main, state, _) in held.items():
        assert state["exp_avg"].numel() == state["exp_avg_sq"].numel() == main.numel() == sizes[name], name
        assert state["exp_avg"].dtype == main.dtype == torch.float32
    states = [state for part in made.optimizer.chained_optimizers for state in part.optimizer.state.values()]
    assert len(states) == len(held)  # nothing else has state
    assert sorted(made.buffered()) == sorted(trained_names())
    unit = PARAMETER_START if distributed else 1
    room = sum(-(-sizes[name] // unit) * unit for name in trained_names())
    assert sum(buffer.numel_unpadded for buffer in made.wrapped.buffers) <= room
    for name, parameter in made.network.named_parameters():
        assert hasattr(parameter, "main_grad") == (name in trained_names())


def test_a_parameter_that_is_not_frozen_would_be_seen(half, distributed):
    """Control: one attention weight too many shows in the optimizer and in the buffers."""
    thawed = "decoder.layers.0.self_attention.linear_proj.weight"
    made = job("expert", half, distributed, thaw=thawed)
    made.step()
    assert set(made.held()) == set(made.buffered()) == trained_names() | {thawed}


def test_frozen_parameters_stay_bit_identical_and_the_others_move(half, distributed):
    made = job("expert", half, distributed, decay=DECAY)
    before = {name: parameter.detach().clone() for name, parameter in made.network.named_parameters()}
    for _ in range(3):
        made.wrapped.zero_grad_buffer()
        models.logits(made.wrapped.train()).square().sum().backward()
        made.wrapped.finish_grad_sync()
        made.optimizer.step()
    for name, parameter in made.network.named_parameters():
        moved = not torch.equal(before[name].view(torch.uint8), parameter.detach().view(torch.uint8))
        assert moved == (name in trained_names()), name


def test_each_kind_moves_at_its_own_rate(half, distributed):
    made = job("expert", half, distributed)
    made.optimizer.config.clip_grad = 0.0
    before = {name: main.detach().clone() for name, (main, _, _) in made.held().items()}
    made.step()
    rates = {"log_alpha": MASK_LR, "lambdas": LAMBDA_LR, "weight": LR}
    for name, (main, _, group) in made.held().items():
        rate = rates[name.rsplit(".", 1)[-1]]
        moved = (before[name] - main).mean().item()  # Adam's first step is the rate, whatever the gradient
        assert moved == pytest.approx(rate, rel=ADAM_EPS_RTOL), name
        assert group["max_lr"] == rate


def test_weights_decay_and_masks_and_lambdas_do_not(half, distributed):
    made = job("expert", half, distributed, decay=DECAY)
    before = {name: main.detach().clone() for name, (main, _, _) in made.held().items()}
    made.step({"weight": 0.0, "log_alpha": 0.0, "lambdas": 0.0})
    for name, (main, _, _) in made.held().items():
        kept = 1 - LR * DECAY if name.endswith("weight") else 1.0
        torch.testing.assert_close(main.detach(), before[name] * kept, rtol=1e-6, atol=0, msg=name)
        assert torch.equal(main.detach(), before[name]) != name.endswith("weight")


def first_moments(distributed: bool, half: bool, gate_gradient: float) -> dict[str, Any]:
    """Return the clipped gradients, and as `norm` the reported norm over that of the weights' gradients."""
    made = job("expert", half, distributed)
    small = {"weight": 1e-3, "log_alpha": gate_gradient, "lambdas": gate_gradient}
    norm = made.step(small)
    held = made.held()
    weights = sum(main.numel() for name, (main, _, _) in held.items() if name.endswith("weight"))
    moments = {name: state["exp_avg"] / (1 - BETA1) for name, (_, state, _) in held.items()}
    return {**moments, "norm": norm / (1e-3 * weights**0.5)}


def test_masks_and_lambdas_stay_out_of_the_weights_clip(half, distributed):
    """Adam's first moment after one step is the clipped gradient: huge gradients of gates leave that of weights."""
    moments = first_moments(distributed, half, 1e3)
    assert moments.pop("norm") == pytest.approx(1, rel=1e-4)
    for name, moment in moments.items():
        if name.endswith("weight"):
            assert moment.mean().item() == pytest.approx(1e-3, rel=1e-4), name
        else:
            assert moment.abs().max() < 1, name  # clipped by the norm of their own kind


def test_one_common_clip_would_be_seen(half, distributed, monkeypatch):
    """Control: without norm groups of their own the gates' gradients shrink those of the weights."""
    monkeypatch.setattr(tm, "register_grad_norm_groups", lambda: None)
    monkeypatch.setattr(megatron_optimizer, "SEPARATE_GRAD_NORM_GROUPS", ("mtp",))
    monkeypatch.setattr(megatron_optimizer, "_is_separate_grad_norm_group", lambda group: False)
    moments = first_moments(distributed, half, 1e3)
    assert moments.pop("norm") > 1e3
    assert max(moment.abs().max() for name, moment in moments.items() if name.endswith("weight")) < 1e-6


def test_experts_have_an_optimizer_of_their_own_in_one_process_too(half, distributed):
    """So that a checkpoint of one process goes on with expert parallelism, and back."""
    made = job("moe", half, distributed)
    dense, experts = made.optimizer.chained_optimizers
    expected = {name for name in made.names.values() if ".experts." in name}
    buffers = made.wrapped.expert_parallel_buffers
    assert {made.names[id(parameter)] for buffer in buffers for parameter in buffer.params} == expected
    assert sum(len(group["params"]) for group in experts.param_groups) == len(expected) > 0
    assert not any(group["is_expert_parallel"] for group in dense.param_groups)


def test_everything_is_trained_in_the_moe_stage(half, distributed):
    made = job("moe", half, distributed)
    made.step()
    assert set(made.held()) == set(made.names.values()) == set(made.buffered())

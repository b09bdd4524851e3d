"""Masks-only mode (`--l0-train-weights off`): what is trained, which steps have a gradient, what is refused."""

import megatron_models as models
import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_l0moe.modules.hard_concrete import HardConcreteGate
from megatron_l0moe.modules.retention import GateStep, Phase
from megatron_l0moe.modules.trained_part import parts
from megatron_l0moe.runtime import cpu
from megatron_l0moe.training import forward_step as fs
from megatron_l0moe.training import model as tm
from megatron_l0moe.training.arguments import JobSettings, StageConfig
from megatron_l0moe.training.model import group_overrides

GATED = models.LAYERS - models.DENSE


@pytest.fixture(autouse=True)
def process_group():
    with cpu.one_process_group():
        torch.manual_seed(0)
        yield


def built(train_weights: str, phase: Phase, control: str = "lagrangian"):
    plan = models.plan("expert", l0_retention_control=control)
    model = models.build("expert", layer_plan=plan).train()
    stage = StageConfig(l0_stage="expert", l0_dense_layers=models.DENSE, l0_train_weights=train_weights)  # type: ignore[arg-type]
    settings = JobSettings(stage, plan)
    tm.prepare_for_training([model], settings)
    for gate in parts(model, HardConcreteGate):
        gate.begin_iteration(GateStep(5, phase, 0.5, 1.0))
    return model, settings


@pytest.mark.parametrize("control", ["lagrangian", "budget"])
@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed"])
def test_the_optimizer_holds_masks_and_lambdas_only(control, distributed):
    model, settings = built("off", Phase.LEARN, control)
    buffers = DistributedDataParallelConfig(use_distributed_optimizer=distributed)
    wrapped = DistributedDataParallel(model.config, buffers, model)
    options = OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=distributed)
    optimizer = get_megatron_optimizer(options, [wrapped], config_overrides=group_overrides(settings.stage))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    models.logits(wrapped).square().sum().backward()
    wrapped.finish_grad_sync()
    optimizer.step()
    trained = GATED * (models.FFN + (2 if control == "lagrangian" else 0))
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    assert sum(p.numel() for part in parts for group in part.param_groups for p in group["params"]) == trained
    moments = [
        s[key] for part in parts for s in part.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")
    ]
    assert sum(moment.numel() for moment in moments) == 2 * trained
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    expected = {"log_alpha", "lambdas"} if control == "lagrangian" else {"log_alpha"}
    assert {name.rsplit(".", 1)[-1] for name in moved} == expected
    assert len(moved) == GATED * len(expected)


@pytest.mark.parametrize("train_weights", ["on", "off"])
@pytest.mark.parametrize("phase", list(Phase), ids=lambda phase: phase.value)
def test_a_step_is_known_to_have_a_gradient_exactly_when_it_has_one(train_weights, phase):
    model, settings = built(train_weights, phase)
    has_one = train_weights == "on" or phase is Phase.LEARN
    assert models.logits(model).requires_grad is has_one
    assert fs._trains(model, settings) is has_one


def test_a_rank_without_trained_layers_has_no_gradient():
    model, settings = built("on", Phase.LEARN)
    model.requires_grad_(False)
    assert not fs._trains(model, settings)

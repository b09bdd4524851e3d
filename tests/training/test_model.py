"""What each stage trains, in which parameter group, looked at in the optimizer itself."""

import megatron_models as models
import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import SEPARATE_GRAD_NORM_GROUPS

from megatron_l0moe.runtime import cpu
from megatron_l0moe.training import model as tm
from megatron_l0moe.training.arguments import JobSettings, StageConfig
from megatron_l0moe.training.model import group_overrides


@pytest.fixture(autouse=True)
def process_group():
    with cpu.one_process_group():
        torch.manual_seed(0)
        yield


def built(stage: str, **settings):
    plan = models.plan(stage)
    model = models.build(stage, layer_plan=plan)
    config = StageConfig(l0_stage=stage, l0_dense_layers=models.DENSE, **settings)
    tm.prepare_for_training([model], JobSettings(config, plan))
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    options = OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.1, clip_grad=1.0)
    return (
        model,
        wrapped,
        get_megatron_optimizer(options, [wrapped], config_overrides=group_overrides(config)),
    )


def names_in(model, optimizer) -> dict[str, dict]:
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return {by_id[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


def test_expert_stage_trains_gates_and_mlps_of_the_gated_layers_only():
    model, wrapped, optimizer = built("expert", l0_mask_lr=0.3, l0_lambda_lr=0.2)
    groups = names_in(model, optimizer)
    expected = {
        f"decoder.layers.{layer}.mlp.{name}"
        for layer in range(models.DENSE, models.LAYERS)
        for name in ("linear_fc1.weight", "linear_fc2.weight", "gate.log_alpha", "gate.controller.lambdas")
    }
    assert set(groups) == expected
    buffered = sum(buffer.grad_data.numel() for buffer in wrapped.buffers)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained <= buffered < trained + 1024  # frozen parameters take no gradient buffer (padding aside)
    for name, group in groups.items():
        rate = {"log_alpha": 0.3, "lambdas": 0.2}.get(name.rsplit(".", 1)[-1], 1e-3)
        assert group["max_lr"] == pytest.approx(rate), name
        assert (group["wd_mult"] == 0.0) == (not name.endswith("weight")), name


def test_masks_and_lambdas_stay_out_of_the_weights_gradient_norm():
    model, _wrapped, optimizer = built("expert")
    assert {tm.MASK_GROUP, tm.LAMBDA_GROUP} <= set(tm.megatron_optimizer.SEPARATE_GRAD_NORM_GROUPS)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.main_grad.fill_(1e3 if "gate" in name else 1e-3)
    weights = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "gate" not in n)
    _, norm, _ = optimizer.step()
    assert norm == pytest.approx(1e-3 * weights**0.5, rel=1e-4)


def test_frozen_parameters_stay_bit_identical():
    model, wrapped, optimizer = built("expert")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    models.logits(wrapped.train()).square().sum().backward()
    wrapped.finish_grad_sync()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) != parameter.requires_grad, name


def test_masks_only_mode_trains_no_weight():
    model, _, optimizer = built("expert", l0_train_weights="off")
    assert all(".gate." in name for name in names_in(model, optimizer))


def test_routers_have_their_own_learning_rate():
    model, _, optimizer = built("moe", l0_router_lr=0.01)
    groups = names_in(model, optimizer)
    assert {g["max_lr"] for n, g in groups.items() if "router" in n} == {0.01}
    assert {g["max_lr"] for n, g in groups.items() if "router" not in n} == {1e-3}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_registering_the_norm_groups_twice_changes_nothing():
    tm.register_grad_norm_groups()
    groups = tm.megatron_optimizer.SEPARATE_GRAD_NORM_GROUPS
    tm.register_grad_norm_groups()
    assert groups == tm.megatron_optimizer.SEPARATE_GRAD_NORM_GROUPS
    assert len(set(groups)) == len(groups)
    assert set(SEPARATE_GRAD_NORM_GROUPS) <= set(groups)  # Megatron's own stay


def gradients(*, recompute: bool, hook: bool = True) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    plan = models.plan("expert")
    model = models.build("expert", layer_plan=plan).train()
    if recompute:
        model.config.recompute_granularity, model.config.recompute_method = "full", "uniform"
        model.config.recompute_num_layers = 1
    tm.prepare_for_training(
        [model], JobSettings(StageConfig(l0_stage="expert", l0_dense_layers=models.DENSE), plan)
    )
    if not hook:
        model.embedding._forward_hooks.clear()
    output = models.logits(model)
    if output.requires_grad:
        output.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_full_recomputation_changes_no_gradient():
    plain, recomputed = gradients(recompute=False), gradients(recompute=True)
    assert set(plain) == set(recomputed)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert gradients(recompute=True, hook=False) == {}  # control: without the hook no gradient at all

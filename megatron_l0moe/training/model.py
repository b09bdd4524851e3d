"""The GPT model of a stage: Megatron's builder with our layer specs, what of it is trained, and at which rate.

Learning rates and weight decay of our own parameters go through Megatron's parameter-group overrides; our settings lie
inside every checkpoint, under the key `l0moe` of its common state.
"""

import argparse
import functools
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import ParamGroupOverride, ParamKey
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelConfig

from megatron_l0moe.modules.l0_mlp import L0MLP
from megatron_l0moe.modules.layer_specs import LayerPlan, block_spec
from megatron_l0moe.modules.trained_part import LAMBDA_GROUP, MASK_GROUP, ROUTER_GROUP, TrainedPart
from megatron_l0moe.training.arguments import JobSettings, StageConfig

GROUPS_WITH_A_NORM = (MASK_GROUP, LAMBDA_GROUP)
"""Groups of their own in Megatron's gradient clip too (core/optimizer/optimizer.py, SEPARATE_GRAD_NORM_GROUPS)."""


def model_config(args: argparse.Namespace, settings: JobSettings) -> GPTModelConfig:
    """Return Megatron's model config with our specs and our freezing hook."""
    config: GPTModelConfig = gpt_config_from_args(args)
    # gpt_config_from_args leaves --rope-scaling-factor out (training/argument_utils.py:464); Llama-3.2 has 32, not 8.
    config.rope_scaling_factor = args.rope_scaling_factor
    # One checkpoint key for each layer: the layers of the expert stage do not all hold the same tensors.
    assert hasattr(config.transformer, "hetereogenous_dist_checkpoint"), "renamed in this Megatron"
    config.transformer.hetereogenous_dist_checkpoint = True
    config.transformer_layer_spec = functools.partial(_layer_spec, plan=settings.plan)
    config.pre_wrap_hooks.append(functools.partial(prepare_for_training, settings=settings))
    return config


def _layer_spec(config: GPTModelConfig, vp_stage: int | None, *, plan: LayerPlan) -> Any:
    return block_spec(config.transformer, plan, vp_stage=vp_stage)


def prepare_for_training(models: list[GPTModel], settings: JobSettings) -> list[GPTModel]:
    """Freeze what the stage does not train and mark our own parameters, before Megatron wraps the model.

    The expert stage trains the gates and the MLPs of the gated layers and nothing else, so that all K expert runs
    share one backbone (paper section 3.2: all non-MLP parameters are frozen).
    """
    register_grad_norm_groups()
    for model in models:
        if settings.plan.stage == "expert":
            model.requires_grad_(False)
            if _recomputes_mlps(model.config):
                _let_gradients_start_at_the_embedding(model)
        for module in model.modules():
            if isinstance(module, L0MLP):
                module.requires_grad_(settings.stage.l0_train_weights == "on")
            elif isinstance(module, TrainedPart):
                _train(module)
            elif isinstance(module, MoELayer):
                _mark_experts(module.experts)
    return models


def _mark_experts(experts: torch.nn.Module) -> None:
    """Give experts an optimizer of their own in every layout.

    Megatron does so only above an expert-parallel size of 1 (core/tensor_parallel/layers.py sets `allreduce`), so a
    checkpoint of one process would hold one optimizer, where more expert-parallel processes look for two.
    """
    for parameter in experts.parameters():
        parameter.allreduce = False  # type: ignore[attr-defined]  # Megatron's own mark


def _recomputes_mlps(config: Any) -> bool:
    full = config.recompute_granularity == "full"
    return full or (config.recompute_granularity == "selective" and "mlp" in config.recompute_modules)


def _let_gradients_start_at_the_embedding(model: GPTModel) -> None:
    """Make the hidden states require a gradient although embedding and bottom layers are frozen.

    Megatron's recomputation of layers or MLPs returns outputs without a gradient for inputs without one, and its
    schedule then leaves the backward pass out without a word (core/pipeline_parallel/schedules.py:570).
    """
    if getattr(model, "pre_process", False):
        model.embedding.register_forward_hook(
            lambda module, inputs, output: output.requires_grad_() if torch.is_grad_enabled() else output
        )


def _train(part: TrainedPart) -> None:
    for parameter, group in part.parameter_groups():
        parameter.requires_grad_(True)
        setattr(parameter, group, True)
        if group in GROUPS_WITH_A_NORM:
            setattr(parameter, megatron_optimizer.GRAD_NORM_GROUP_ATTR, group)


def register_grad_norm_groups() -> None:
    """Keep masks and lambdas out of the weights' gradient norm and clip; each group is clipped by its own norm."""
    known = megatron_optimizer.SEPARATE_GRAD_NORM_GROUPS
    missing = tuple(group for group in GROUPS_WITH_A_NORM if group not in known)
    megatron_optimizer.SEPARATE_GRAD_NORM_GROUPS = known + missing


def group_overrides(stage: StageConfig) -> dict[ParamKey, ParamGroupOverride]:
    """Return the overrides: masks and lambdas with rates of their own and no weight decay, routers with a rate."""
    overrides: dict[ParamKey, ParamGroupOverride] = {
        ParamKey(attr=MASK_GROUP): {"max_lr": stage.l0_mask_lr, "min_lr": 0.0, "wd_mult": 0.0},
        ParamKey(attr=LAMBDA_GROUP): {"max_lr": stage.l0_lambda_lr, "min_lr": 0.0, "wd_mult": 0.0},
    }
    if stage.l0_router_lr:
        overrides[ParamKey(attr=ROUTER_GROUP)] = {"max_lr": stage.l0_router_lr, "min_lr": 0.0}
    return overrides

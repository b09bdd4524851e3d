"""Learning rates and weight decay of our own parameters, through Megatron's parameter-group overrides."""

import argparse
from collections.abc import Callable
from typing import Any

from megatron.core.optimizer import ParamGroupOverride, ParamKey
from megatron.training import training as megatron_training

from megatron_l0moe.training.arguments import StageConfig
from megatron_l0moe.training.model import LAMBDA_GROUP, MASK_GROUP, ROUTER_GROUP


def group_overrides(stage: StageConfig) -> dict[ParamKey, ParamGroupOverride]:
    """Return the overrides: masks and lambdas with rates of their own and no weight decay, routers with a rate."""
    overrides: dict[ParamKey, ParamGroupOverride] = {
        ParamKey(attr=MASK_GROUP): {"max_lr": stage.l0_mask_lr, "min_lr": 0.0, "wd_mult": 0.0},
        ParamKey(attr=LAMBDA_GROUP): {"max_lr": stage.l0_lambda_lr, "min_lr": 0.0, "wd_mult": 0.0},
    }
    if stage.l0_router_lr:
        overrides[ParamKey(attr=ROUTER_GROUP)] = {"max_lr": stage.l0_router_lr, "min_lr": 0.0}
    return overrides


def install_group_overrides(stage: StageConfig) -> None:
    """Add our overrides where Megatron's loop asks for the optimizer's config (training/training.py:1962).

    The loop has no other seam for them: `setup_model_and_optimizer` calls the function by its module's name.
    """
    original: Callable[[argparse.Namespace], tuple[Any, dict[Any, Any]]] = (
        megatron_training.get_megatron_optimizer_config
    )

    def get_megatron_optimizer_config(args: argparse.Namespace) -> tuple[Any, dict[Any, Any]]:
        config, overrides = original(args)
        return config, {**overrides, **group_overrides(stage)}

    megatron_training.get_megatron_optimizer_config = get_megatron_optimizer_config

"""Workarounds for defects of megatron-core 0.19.2 in saving and loading optimizers; each names its upstream place.

`install` is called once, on the CPU and on GPUs alike, before Megatron builds its optimizer.
"""

import functools
import importlib
from typing import Any

MAIN_PARAMETERS = "fp32_from_fp16_params"  # float32 copies of the float16 parameters, by group

_installed: list[str] = []


def install() -> None:
    """Install all workarounds."""
    if not _installed:
        _fp32_parameters_in_float16_optimizer()


def _fp32_parameters_in_float16_optimizer() -> None:
    """Let a bf16 model with float32 parameters (our masks and lambdas) save its optimizer.

    core/optimizer/optimizer.py:1150, Float16OptimizerWithFloat16Params.sharded_state_dict: the map from parameter
    ids to model tensors is made from the float16 groups alone, so a float32 parameter ends the save with
    "Param id 6 does not match any model sharded param", and every id after it would be counted wrong. For the time
    of the call the float16 groups are completed by the float32 ones; no group mixes both, since masks and lambdas
    have learning rates, and so groups, of their own. The list of groups is saved as a dict of those that hold
    float16 parameters: core/dist_checkpointing/dict_utils.py:51 drops empty lists and so shifts the others.
    """
    optimizer_class = importlib.import_module(
        "megatron.core.optimizer.optimizer"
    ).Float16OptimizerWithFloat16Params
    save, load = optimizer_class.sharded_state_dict, optimizer_class.load_state_dict

    @functools.wraps(save)
    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        float16_groups = self.float16_groups
        pairs = list(zip(float16_groups, self.fp32_from_fp32_groups, strict=True))
        assert not any(half and full for half, full in pairs), "a parameter group mixes float16 and float32"
        self.float16_groups = [half or full for half, full in pairs]
        try:
            state = save(self, *args, **kwargs)
        finally:
            self.float16_groups = float16_groups
        state[MAIN_PARAMETERS] = {i: group for i, group in enumerate(state[MAIN_PARAMETERS]) if group}
        return state

    @functools.wraps(load)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        groups = state_dict[MAIN_PARAMETERS]
        if isinstance(groups, dict):
            ordered = [groups.get(i, []) for i in range(len(self.fp32_from_float16_groups))]
            state_dict = {**state_dict, MAIN_PARAMETERS: ordered}
        load(self, state_dict)

    optimizer_class.sharded_state_dict = sharded_state_dict
    optimizer_class.load_state_dict = load_state_dict
    _installed.append("fp32_parameters_in_float16_optimizer")

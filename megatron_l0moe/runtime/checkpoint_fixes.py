"""Workarounds for defects of megatron-core 0.19.2 in saving and loading optimizers; each names its upstream place.

`install` is called once, on the CPU and on GPUs alike, before Megatron builds its optimizer or loads anything; it also
lets torch read a checkpoint's metadata safely (`checkpoint_metadata.py`). Those that concern torch's Adam, which
Megatron takes where neither Transformer Engine nor Apex can be imported, do nothing elsewhere.
"""

import functools
import importlib
import queue
from collections.abc import Callable
from typing import Any

import torch

from megatron_l0moe.runtime import checkpoint_metadata

MAIN_PARAMETERS = "fp32_from_fp16_params"  # float32 copies of the float16 parameters, by group
NO_PARAMETERS = "no_parameters"  # key of the inner optimizer's state that only holds the step

_installed: list[str] = []


def install() -> None:
    """Install all workarounds."""
    if _installed:
        return
    checkpoint_metadata.install()
    for workaround in WORKAROUNDS:
        workaround()
        _installed.append(workaround.__name__)


def keep_results_here() -> None:
    """Hand the results of a synchronous save on inside the process; for runs without --async-save.

    core/dist_checkpointing/strategies/filesystem_async.py:53, get_write_results_queue: the first save of each rank
    starts a manager process for the one message that the writer, which runs in the same process then, has for it. The
    manager is spawned, so it imports the training program and torch once more: 4 s and a third of a gigabyte a rank.
    """
    writer = _megatron("dist_checkpointing.strategies.filesystem_async")
    assert hasattr(writer, "_results_queue"), "filesystem_async._results_queue is gone; see checkpoint_fixes"
    writer._results_queue = queue.Queue()


def fp32_parameters_in_float16_optimizer() -> None:
    """Let a bf16 model with float32 parameters (our masks and lambdas) save its optimizer.

    core/optimizer/optimizer.py:1150, Float16OptimizerWithFloat16Params.sharded_state_dict: the map from parameter
    ids to model tensors is made from the float16 groups alone, so a float32 parameter ends the save with
    "Param id 6 does not match any model sharded param", and every id after it would be counted wrong. For the time
    of the call the float16 groups are completed by the float32 ones; no group mixes both, since masks and lambdas
    have learning rates, and so groups, of their own. The list of groups is saved as a dict of those that hold
    float16 parameters: core/dist_checkpointing/dict_utils.py:51 drops empty lists and so shifts the others.
    """
    optimizer_class = _megatron("optimizer.optimizer").Float16OptimizerWithFloat16Params
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
        groups = state_dict.get(MAIN_PARAMETERS, {})  # nothing on a rank without parameters
        if isinstance(groups, dict):
            ordered = [groups.get(i, []) for i in range(len(self.fp32_from_float16_groups))]
            state_dict = {**state_dict, MAIN_PARAMETERS: ordered}
        load(self, state_dict)

    optimizer_class.sharded_state_dict = sharded_state_dict
    optimizer_class.load_state_dict = load_state_dict


def fresh_distributed_optimizer_has_a_step() -> None:
    """Let a distributed optimizer that has made no step describe itself, as it must in order to be loaded.

    core/optimizer/distrib_optimizer.py:839, DistributedOptimizer.state_dict: `assert len(steps) == 1` over the state
    of torch's Adam, which is made in the first step. The state is made here, as zeros: what Adam begins with.
    """
    state_dict = _distributed_optimizer().state_dict

    @functools.wraps(state_dict)
    def with_state(self: Any) -> Any:
        _make_adam_state(self.optimizer)
        return state_dict(self)

    _distributed_optimizer().state_dict = with_state


def step_is_no_parameter_state() -> None:
    """Load Adam's moments without asking the checkpoint for a `step` of each parameter.

    core/optimizer/distrib_optimizer.py:1223, _set_main_param_and_optimizer_states: copies every tensor of the state,
    `step` too, which `fully_reshardable` does not hold (KeyError: 'step'), and which `dp_reshardable` holds as it was
    in another state, so that Adam's bias correction starts anew without a word. The step comes from the parameter
    groups instead (:1032); a value that is no tensor is skipped (:1223).
    """
    set_states = _distributed_optimizer()._set_main_param_and_optimizer_states

    @functools.wraps(set_states)
    def without_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        set_states(self, model_param, {**tensors, "step": None})

    _distributed_optimizer()._set_main_param_and_optimizer_states = without_step


def parameters_do_not_share_a_step() -> None:
    """Give each parameter a `step` of its own after a load.

    core/optimizer/distrib_optimizer.py:1032, DistributedOptimizer.load_state_dict: one tensor becomes the `step` of
    all parameters, and torch's Adam then advances it once for each of them: wrong training without a word.
    """
    load_state_dict = _distributed_optimizer().load_state_dict

    @functools.wraps(load_state_dict)
    def with_own_steps(self: Any, state_dict: Any) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    _distributed_optimizer().load_state_dict = with_own_steps


def loading_needs_no_gradient() -> None:
    """Copy loaded values into float32 parameters without autograd.

    core/optimizer/distrib_optimizer.py:1225, _set_main_param_and_optimizer_states: the shard of a float32 parameter is
    a view of it (:467), so the copy ends in "a view of a leaf Variable that requires grad is being used in an in-place
    operation"; a float32 mask in a bf16 model is enough. In 0.19.2 `fully_reshardable` is loaded without autograd
    already (:2358), `dp_reshardable` (:2061) is not.
    """
    set_states = _distributed_optimizer()._set_main_param_and_optimizer_states
    _distributed_optimizer()._set_main_param_and_optimizer_states = torch.no_grad()(set_states)


def ranks_without_parameters_know_the_step() -> None:
    """Save the step of the optimizer also when rank 0 trains nothing, as a pipeline rank of frozen dense layers.

    What is the same on all ranks is saved by rank 0 alone. core/optimizer/optimizer.py:536,
    _extract_common_per_param_step, finds no step there, so the checkpoint has none and Adam's first step after a resume
    ends in KeyError: 'step'; core/optimizer/distrib_optimizer.py:839 asserts that there is one. The ranks agree on it.
    """
    base = _megatron("optimizer.optimizer").MegatronOptimizer
    extract = base._extract_common_per_param_step

    @functools.wraps(extract)
    def agreed_step(state_dict: Any) -> Any:
        return _agree(extract(state_dict))

    base._extract_common_per_param_step = staticmethod(agreed_step)
    if not uses_torch_adam():
        return
    sharded_state_dict = _distributed_optimizer().sharded_state_dict

    @functools.wraps(sharded_state_dict)
    def with_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        states = self.optimizer.state
        has_parameters = any(group["params"] for group in self.optimizer.param_groups)
        owned = [state["step"] for state in states.values()] if has_parameters else []
        step = _agree(owned[0] if owned else None)
        if not has_parameters:
            states[NO_PARAMETERS] = {"step": torch.zeros(()) if step is None else step}
        return sharded_state_dict(self, *args, **kwargs)

    _distributed_optimizer().sharded_state_dict = with_step


def for_torch_adam(workaround: Callable[[], None]) -> Callable[[], None]:
    """Return a workaround that does nothing with Transformer Engine's or Apex's Adam."""

    @functools.wraps(workaround)
    def install_for_torch_adam() -> None:
        if uses_torch_adam():
            workaround()

    return install_for_torch_adam


def uses_torch_adam() -> bool:
    """Return whether Megatron's distributed optimizer wraps torch's Adam."""
    return not _megatron("optimizer.distrib_optimizer").HAVE_APEX_OR_TE


WORKAROUNDS = (
    fp32_parameters_in_float16_optimizer,
    for_torch_adam(fresh_distributed_optimizer_has_a_step),
    for_torch_adam(step_is_no_parameter_state),
    for_torch_adam(parameters_do_not_share_a_step),
    for_torch_adam(loading_needs_no_gradient),
    ranks_without_parameters_know_the_step,
)


def _make_adam_state(optimizer: Any) -> None:
    """Make what torch's Adam makes in its first step, for parameters that have no state yet."""
    assert isinstance(optimizer, torch.optim.Adam), type(optimizer)  # AdamW is one
    for group in optimizer.param_groups:
        on_device = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            if not optimizer.state.get(parameter):
                device = parameter.device if on_device else torch.device("cpu")
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _agree(step: torch.Tensor | int | None) -> torch.Tensor | None:
    """Return the step that any rank knows, float32 on the CPU, or None; called by all ranks together."""
    known = torch.tensor(-1.0 if step is None else float(step), device=torch.cuda.current_device())
    torch.distributed.all_reduce(known, op=torch.distributed.ReduceOp.MAX)
    return None if known.item() < 0 else known.cpu()


def _distributed_optimizer() -> Any:
    return _megatron("optimizer.distrib_optimizer").DistributedOptimizer


def _megatron(name: str) -> Any:
    return importlib.import_module(f"megatron.core.{name}")

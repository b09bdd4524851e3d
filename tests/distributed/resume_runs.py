"""Several training runs of a toy model, one after another in the same processes; a program for torchrun.

`resume_runs.py PLAN.json`: PLAN is a list of {"argv": [...], "broken": NAME or "", "label": ...}. Each run is a whole
`megatron_l0moe.training.pretrain`; between two of them Megatron's global state is taken down. One launch for many runs,
since a launch alone takes ten seconds of every rank. `broken` names a fault that is built in, for controls.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs.training_end import STOPPED
from megatron_l0moe.runtime import cpu


def main(plan: list[dict[str, Any]]) -> None:
    cpu.install_training()
    import torch

    from megatron_l0moe.training import pretrain

    for run in plan:
        sys.argv[1:] = run["argv"]
        with contextlib.ExitStack() as stack:
            stack.enter_context(_unpatched_loop())
            if run["broken"]:
                stack.enter_context(FAULTS[run["broken"]]())
            _train(pretrain.main)
        _take_down()
        if torch.distributed.get_rank() == 0:
            print("finished", run["label"], flush=True)
    torch.distributed.destroy_process_group()


def _train(job: Callable[[], None]) -> None:
    try:
        job()
    except SystemExit as end:  # Megatron's way to stop at --exit-interval
        if end.code != STOPPED:
            raise
    except L0MoEError as error:
        if type(error).__name__ != "NotANumberError":  # a run whose numbers were broken on purpose
            raise
        print(error, flush=True)


@contextlib.contextmanager
def _unpatched_loop() -> Iterator[None]:
    """Take back what `pretrain.main` wraps: a second run would wrap it again and write to the first one's files."""
    from megatron.training import checkpointing, training

    modules = (checkpointing, training)
    before = [dict(vars(module)) for module in modules]
    try:
        yield
    finally:
        for module, values in zip(modules, before, strict=True):
            for name, value in values.items():
                if callable(value):
                    setattr(module, name, value)


def _take_down() -> None:
    from distributed.groups import destroy_groups
    from megatron.core import num_microbatches_calculator, rerun_state_machine
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.training import global_vars

    destroy_moe_metrics_tracker()  # it holds the groups of the layout that ends
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    rerun_state_machine.destroy_rerun_state_machine()
    global_vars.destroy_global_vars()
    destroy_groups()


@contextlib.contextmanager
def _replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    before = vars(owner)[name]  # a static method as it stands in its class
    setattr(owner, name, make(getattr(owner, name)))
    try:
        yield
    finally:
        setattr(owner, name, before)


def _shared_step() -> Any:
    """Defect 3 again: after the load all parameters share one `step` tensor."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    def make(load: Any) -> Any:
        def load_state_dict(self: Any, state_dict: Any) -> None:
            load(self, state_dict)
            states = list(self.optimizer.state.values())
            for state in states:
                state["step"] = states[0]["step"]

        return load_state_dict

    return _replaced(DistributedOptimizer, "load_state_dict", make)


def _data_from_the_start() -> Any:
    """The run goes on with the first sample again."""
    from megatron.training import training

    def make(load: Any) -> Any:
        def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
            result = load(*args, **kwargs)
            training.get_args().consumed_train_samples = 4  # 0 would be put right by Megatron
            return result

        return load_checkpoint

    return _replaced(training, "load_checkpoint", make)


def _schedule_shifted() -> Any:
    """Gates are told the iteration after theirs."""
    from megatron_l0moe.training import forward_step

    def make(begin: Any) -> Any:
        def begin_iteration(model: Any, settings: Any, *, iteration: int, total: int) -> None:
            begin(model, settings, iteration=iteration + 1, total=total)

        return begin_iteration

    return _replaced(forward_step, "begin_iteration", make)


def _rank_0_decides_the_step() -> Any:
    """A pipeline rank of frozen layers, rank 0, has no step, and the checkpoint gets none."""
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    def make(agreed: Any) -> Any:
        return staticmethod(agreed.__wrapped__)

    return _replaced(MegatronOptimizer, "_extract_common_per_param_step", make)


def _loss_times(factor: float, step: int) -> Any:
    """From step `step` on, counted from 1, the loss that the gradient is taken of is multiplied."""
    from megatron_l0moe.training import forward_step

    def make(loss: Any) -> Any:
        def _loss(mask: Any, output: Any) -> Any:
            total, tokens, report = loss(mask, output)
            return (
                total * (factor if forward_step.get_args().curr_iteration + 1 >= step else 1.0),
                tokens,
                report,
            )

        return _loss

    return _replaced(forward_step, "_loss", make)


def _unseen_nan() -> Any:
    """From step 4 on the loss in the log alone is NaN."""
    from megatron_l0moe.training import forward_step

    def make(loss: Any) -> Any:
        def _loss(mask: Any, output: Any) -> Any:
            total, tokens, report = loss(mask, output)
            bad = forward_step.get_args().curr_iteration + 1 >= 4
            return (
                total,
                tokens,
                {name: value * float("nan") if bad else value for name, value in report.items()},
            )

        return _loss

    return _replaced(forward_step, "_loss", make)


FAULTS = {
    "nan_loss": lambda: _loss_times(float("nan"), 4),
    "nan_from_the_start": lambda: _loss_times(float("nan"), 1),
    "infinite_gradient": lambda: _loss_times(1e38, 4),
    "unseen_nan": _unseen_nan,
    "rank_0_decides_the_step": _rank_0_decides_the_step,
    "shared_step": _shared_step,
    "data_from_the_start": _data_from_the_start,
    "schedule_shifted": _schedule_shifted,
}

if __name__ == "__main__":
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))

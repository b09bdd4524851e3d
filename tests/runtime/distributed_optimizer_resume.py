"""Resume a distributed optimizer with all workarounds but one: `distributed_optimizer_resume.py FOLDER`.

A program of its own, because Megatron's writer starts processes that import the main module again. Prints one JSON
object: for each precision, form of the checkpoint and left-out workaround "equal", "different", or the error.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

from megatron_l0moe.runtime import checkpoint_fixes, cpu

ALL = "none left out"


def main(folder: Path) -> None:
    cpu.install()
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    upstream = dict(vars(DistributedOptimizer))
    patched = {"state_dict", "load_state_dict", "sharded_state_dict", "_set_main_param_and_optimizer_states"}

    def install(left_out: str) -> None:
        for name in patched:
            setattr(DistributedOptimizer, name, upstream[name])
        for workaround in checkpoint_fixes.WORKAROUNDS[1:]:  # the first is of another class
            if workaround.__name__ != left_out:
                workaround()

    outcomes = {}
    names = [workaround.__name__ for workaround in checkpoint_fixes.WORKAROUNDS[1:]]
    with cpu.one_process_group():
        for half, form in itertools.product((False, True), ("fully_reshardable", "dp_reshardable")):
            precision = "bf16" if half else "fp32"
            install("")
            target = folder / precision / form
            expected = _train_and_save(target, half, form)
            for name in [ALL, *names]:
                install(name)
                try:
                    outcome = "equal" if _resume(target, half, form) == expected else "different"
                except Exception as error:  # the outcome is what is tested
                    outcome = f"{type(error).__name__}: {error}"
                outcomes[f"{precision} {form} {name}"] = outcome
    print(json.dumps(outcomes))


def _train_and_save(folder: Path, half: bool, form: str) -> list[Any]:
    from megatron.core import dist_checkpointing

    model, optimizer = _build(half)
    _steps(model, optimizer, (1, 2, 3))
    folder.mkdir(parents=True)
    dist_checkpointing.save(_state(model, optimizer, form, loading=False), folder)
    return _steps(model, optimizer, (4, 5))


def _resume(folder: Path, half: bool, form: str) -> list[Any]:
    from megatron.core import dist_checkpointing

    model, optimizer = _build(half)
    loaded = dist_checkpointing.load(_state(model, optimizer, form, loading=True), folder)
    _network(model).load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    return _steps(model, optimizer, (4, 5))


def _steps(model: Any, optimizer: Any, seeds: tuple[int, ...]) -> list[Any]:
    import torch

    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        optimizer.step()
    return [parameter.float().tolist() for parameter in model.parameters()]


def _build(half: bool) -> tuple[Any, Any]:
    import megatron_models as models
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    from megatron_l0moe.training.arguments import JobSettings, StageConfig
    from megatron_l0moe.training.model import group_overrides, prepare_for_training

    torch.manual_seed(0)
    plan = models.plan("expert")
    model = models.build("expert", layer_plan=plan)
    stage = StageConfig(l0_stage="expert", l0_dense_layers=models.DENSE)
    prepare_for_training([model], JobSettings(stage, plan))
    if half:
        model.config.bf16 = True
        model = Float16Module(model.config, model)
    buckets = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(model.config, buckets, model)
    config = OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        bf16=half,
        params_dtype=torch.bfloat16 if half else torch.float32,
        use_distributed_optimizer=True,
    )
    return wrapped, get_megatron_optimizer(config, [wrapped], config_overrides=group_overrides(stage))


def _network(model: Any) -> Any:
    inner = model.module
    return getattr(inner, "module", inner)  # a bf16 model has one more wrapper


def _state(model: Any, optimizer: Any, form: str, *, loading: bool) -> dict[str, Any]:
    from megatron.core import parallel_state

    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": form,
    }
    sharded = _network(model).sharded_state_dict(metadata=metadata)  # as Megatron's loop: unwrapped
    optimizer_state = optimizer.sharded_state_dict(sharded, is_loading=loading, metadata=metadata)
    return {"model": sharded, "optimizer": optimizer_state}


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Step, save and load the optimizer of a bf16 expert stage: `save_and_load.py FOLDER with|without|manager`.

A program of its own, because Megatron's writer starts processes that import the main module again.
"""

import multiprocessing
import sys
from pathlib import Path
from typing import Any

from megatron_l0moe.runtime import checkpoint_fixes, cpu


def main(folder: Path, fix: str) -> None:
    cpu.install()
    if fix != "without":
        checkpoint_fixes.install()
    if fix == "with":
        checkpoint_fixes.keep_results_here()
    import torch
    from megatron.core import dist_checkpointing

    with cpu.one_process_group():
        model, optimizer = _build()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.main_grad.normal_()
        optimizer.step()
        folder.mkdir()
        dist_checkpointing.save(_state(model, optimizer, loading=False), folder)
        other, fresh = _build()
        loaded = dist_checkpointing.load(_state(other, fresh, loading=True), folder)
        other.module.module.load_state_dict(loaded["model"])
        fresh.load_state_dict(loaded["optimizer"])
        pairs = zip(optimizer.get_parameters(), fresh.get_parameters(), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)
        moments = [[s["exp_avg"] for s in o.optimizer.state.values()] for o in (optimizer, fresh)]
        assert all(torch.equal(one, two) for one, two in zip(*moments, strict=True))
        print("equal", len(moments[0]), "processes", len(multiprocessing.active_children()))


def _build() -> tuple[Any, Any]:
    import megatron_models as models
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    from megatron_l0moe.training.arguments import JobSettings, StageConfig
    from megatron_l0moe.training.model import group_overrides, prepare_for_training

    plan = models.plan("expert")
    model = models.build("expert", layer_plan=plan)
    model.config.bf16 = True
    stage = StageConfig(l0_stage="expert", l0_dense_layers=models.DENSE)
    prepare_for_training([model], JobSettings(stage, plan))
    half = Float16Module(model.config, model)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), half)
    config = OptimizerConfig(optimizer="adam", lr=1e-3, bf16=True, params_dtype=torch.bfloat16)
    return wrapped, get_megatron_optimizer(config, [wrapped], config_overrides=group_overrides(stage))


def _state(model: Any, optimizer: Any, *, loading: bool) -> dict[str, Any]:
    from megatron.core import parallel_state

    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "chained_optim_avoid_prefix": True,
    }
    sharded = model.module.module.sharded_state_dict(metadata=metadata)  # as Megatron's loop: unwrapped
    optimizer_state = optimizer.sharded_state_dict(sharded, is_loading=loading, metadata=metadata)
    return {"model": sharded, "optimizer": optimizer_state}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

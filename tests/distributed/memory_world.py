"""What each rank holds of the layout matrix' tiny model: parameters, gradient buffers, optimizer state.

`torchrun --nproc-per-node 4 memory_world.py FOLDER` writes FOLDER/RANK.json, {layout: {case: numbers}}.
"""

import json
import sys
from pathlib import Path
from typing import Any

from megatron_l0moe.runtime import cpu

LAYOUTS = (
    "DP4",
    "TP2 + SP x DP2 + distributed optimizer",
    "TP2 + SP x PP2",
    "PP2 x DP2",
    "TP2 + SP x EP2, expert-TP 1, allgather",
    "TP2 + SP x EP2, expert-TP 2, allgather",
    "PP2 x VPP2 x EP2, alltoall",
)


def main(folder: Path) -> None:
    """Build every model and make its optimizer's state."""
    cpu.install_training()
    import torch
    from distributed import layouts
    from distributed.groups import destroy_groups
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo")
    found: dict[str, dict[str, Any]] = {}
    for name in LAYOUTS:
        layout = layouts.LAYOUT[name]
        destroy_groups()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor,
        )
        model_parallel_cuda_manual_seed(1)
        rank = parallel_state.get_pipeline_model_parallel_rank()
        found[name] = {
            case.name: {"pipeline_rank": rank, **_measure(layout, case)}
            for case in layouts.CASES
            if case.stage in layout.stages
        }
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


def _measure(layout: Any, case: Any) -> dict[str, Any]:
    from distributed import layout_model
    from megatron.core.optimizer import OptimizerConfig
    from megatron.training import training as megatron_training

    from megatron_l0moe.training.model import group_overrides

    models = layout_model.build(layout, case)
    options = OptimizerConfig(
        optimizer="adam", lr=1e-5, use_distributed_optimizer=layout.distributed_optimizer
    )
    overrides = group_overrides(layout_model.settings(case).stage)
    optimizer = megatron_training.get_megatron_optimizer(options, models, config_overrides=overrides)
    for model in models:
        model.zero_grad_buffer()
    optimizer.step()
    parameters = [p for model in models for p in model.parameters()]
    tensors = [t for model in models for t in (*model.module.parameters(), *model.module.buffers())]
    # `buffers` of Megatron's wrapper are those of gradients; of the module inside, torch's
    buffers = [b for model in models for b in (*model.buffers, *model.expert_parallel_buffers)]
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    moments = [
        state[name].nbytes
        for part in parts
        for state in part.optimizer.state.values()
        for name in ("exp_avg", "exp_avg_sq")
    ]
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "tensors": len(parameters),
        "weights": sum(t.nbytes for t in tensors),
        "gradients": sum(b.grad_data.nbytes for b in buffers),
        "optimizer": sum(moments),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))

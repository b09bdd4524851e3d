"""Steps of the tiny model in every layout of one number of processes, compared with one process.

`torchrun --nproc-per-node N layout_steps.py FOLDER`: one process makes FOLDER/CASE (weights, a Megatron checkpoint) and
FOLDER/CASE.pt (losses, gradients and buffers); any number loads these, goes through the layouts of that number and
writes FOLDER/N.jsonl. The parallel state is made anew for each layout.

Gradients are compared as global tensors: the model's own `sharded_state_dict` says which part of which tensor a rank
holds. Every replica is compared, and every element must be some rank's.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_l0moe.runtime import cpu


def main(folder: Path) -> None:
    """Make the references (one process), then run and compare the layouts."""
    cpu.install()
    import torch
    from distributed import layouts

    torch.distributed.init_process_group("gloo")
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    if world == 1:
        _begin(layouts.REFERENCE)
        for case in layouts.CASES:
            _write_reference(folder, case)
    with (folder / f"{world}.jsonl").open("a", encoding="utf-8") as results:
        for layout, cases in layouts.runs_of(world):
            _begin(layout)
            for case, fault in cases:
                run = _run(folder, layout, case, fault)
                if rank == 0:
                    results.write(json.dumps(asdict(run)) + "\n")
                    results.flush()
    torch.distributed.destroy_process_group()


def _begin(layout: Any) -> None:
    """Make Megatron's global state for a layout."""
    import torch
    from distributed.groups import destroy_groups
    from distributed.layout_model import BATCH, arguments
    from megatron.core import num_microbatches_calculator, parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.training import global_vars

    destroy_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
    )
    num_microbatches_calculator.unset_num_microbatches_calculator()
    num_microbatches_calculator.init_num_microbatches_calculator(
        torch.distributed.get_rank(),
        None,
        BATCH,
        layout.micro_batch,
        parallel_state.get_data_parallel_world_size(),
    )
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    global_vars.set_args(arguments(layout))


def _write_reference(folder: Path, case: Any) -> None:
    """Make the start weights and the numbers of one process."""
    import torch
    from distributed import layout_model, layouts
    from megatron.core import dist_checkpointing

    models = layout_model.build(layouts.REFERENCE, case)
    layout_model.disturb(models[0])
    (folder / case.name).mkdir()
    dist_checkpointing.save(_sharded(models), folder / case.name)
    losses, states = _steps(layouts.REFERENCE, case, models)
    whole = []
    for state in states:
        tensors: dict[str, torch.Tensor] = {}
        for part in state:
            empty = torch.full(part.global_shape, torch.nan, dtype=torch.float64)
            tensors.setdefault(part.key, empty)[part.global_slice()] = part.data.double()
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
        whole.append(tensors)
    torch.save({"losses": losses, "states": whole}, folder / f"{case.name}.pt")


def _run(folder: Path, layout: Any, case: Any, fault: str) -> Any:
    """Load the start weights in a layout, do the steps, and compare them on all ranks."""
    import torch
    from distributed import layout_faults, layout_model, layouts
    from megatron.core import dist_checkpointing

    start = time.perf_counter()
    models = layout_model.build(layout, case, batched_messages=fault == "batched_messages")
    loaded = dist_checkpointing.load(_sharded(models), folder / case.name)
    for name, model in zip(sorted(loaded), models, strict=True):
        model.module.load_state_dict(loaded[name])
    with getattr(layout_faults, fault or "none")(models):
        losses, states = _steps(layout, case, models)
    reference = torch.load(folder / f"{case.name}.pt")
    found: list[Any] = [None] * torch.distributed.get_world_size()
    compared = [_compare(state, whole) for state, whole in zip(states, reference["states"], strict=True)]
    torch.distributed.all_gather_object(found, compared)
    loss = max(abs(own - one) for own, one in zip(losses, reference["losses"], strict=True))
    gradient, where, problems = _merge(found, reference["states"])
    return layouts.Run(
        layout.name, case.name, fault, loss, gradient, where, len(reference["states"][-1]),
        round(time.perf_counter() - start, 2), tuple(problems),
    )  # fmt: skip


def _steps(layout: Any, case: Any, models: list[Any]) -> tuple[list[float], list[list[Any]]]:
    """Return the loss of each step, and the parts of gradients and buffers that this rank holds after it."""
    from distributed import layout_model
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.training import get_args

    from megatron_l0moe.training.forward_step import ForwardStep

    forward_step = ForwardStep(layout_model.settings(case))
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    losses, states = [], []
    for iteration in case.iterations:
        get_args().curr_iteration = iteration
        for model in models:
            model.zero_grad_buffer()
        data = [layout_model.batches(layout, iteration, rank, size) for _ in models]
        several = len(models) > 1
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data if several else data[0],
            model=models if several else models[0],
            num_microbatches=get_num_microbatches(),
            seq_length=layout_model.SEQUENCE,
            micro_batch_size=layout.micro_batch,
            forward_only=False,
        )
        losses.append(_global_loss(reports))
        if layout.distributed_optimizer:
            _gather_gradient_shards(models)
        states.append(_parts(models))
    return losses, states


def _global_loss(reports: list[dict[str, Any]]) -> float:
    """Return the mean over all micro-batches; only last pipeline stages have any."""
    import torch

    own = [float(report["lm loss"][0] / report["lm loss"][1]) for report in reports]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, own)
    values = [value for part in gathered for value in part]
    return sum(values) / len(values)


def _gather_gradient_shards(models: list[Any]) -> None:
    """Complete the gradient buffers: under the distributed optimizer a rank has summed its own shard alone."""
    import torch

    for model in models:
        for buffer in (*model.buffers, *model.expert_parallel_buffers):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                own = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                bucket.grad_data.fill_(torch.nan)
                torch.distributed.all_gather_into_tensor(bucket.grad_data, own, group=group)


def _sharded(models: list[Any]) -> dict[str, Any]:
    from megatron.core import parallel_state

    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return {f"model{i}": model.module.sharded_state_dict(metadata=metadata) for i, model in enumerate(models)}


def _parts(models: list[Any]) -> list[Any]:
    """Return the sharded tensors of a model with gradients in the place of its parameters; zeros where frozen."""
    import torch
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    parameters = [parameter for model in models for parameter in model.parameters()]
    weights = [parameter.data for parameter in parameters]
    for parameter in parameters:
        frozen = not parameter.requires_grad
        parameter.data = torch.zeros_like(parameter.data) if frozen else parameter.main_grad.clone()
    sharded = _sharded(models)
    apply_factories(sharded)
    parts = [part for part in nested_values(sharded) if isinstance(part, ShardedTensor)]
    for part in parts:
        part.data = part.data.detach().clone()
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data = weight
    return parts


def _compare(state: list[Any], whole: dict[str, Any]) -> dict[str, tuple[float, int]]:
    """Return, for each tensor of this rank, the largest difference and the elements of which it is the first owner."""
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    found: dict[str, tuple[float, int]] = {}
    for part in state:
        if part.key in whole:
            difference = (part.data.double() - whole[part.key][part.global_slice()]).abs()
            largest = float(difference.max()) if bool(difference.isfinite().all()) else float("inf")
        else:
            largest = float("inf")
        before = found.get(part.key, (0.0, 0))
        owned = part.data.numel() if is_main_replica(part.replica_id) else 0
        found[part.key] = (max(before[0], largest), before[1] + owned)
    return found


def _merge(ranks: list[Any], wholes: list[dict[str, Any]]) -> tuple[float, str, list[str]]:
    """Return the largest difference over steps and ranks, the tensor's name, and what was not compared."""
    largest, where, problems = 0.0, "", []
    for step, whole in enumerate(wholes):
        owned: dict[str, int] = {}
        for rank, steps in enumerate(ranks):
            for key, (difference, elements) in steps[step].items():
                owned[key] = owned.get(key, 0) + elements
                if difference > largest:
                    largest, where = difference, f"{key} in step {step} on rank {rank}"
        problems += [f"{key} in no layout of one process" for key in owned if key not in whole]
        problems += [
            f"{key}: {owned.get(key, 0)} of {tensor.numel()} elements"
            for key, tensor in whole.items()
            if owned.get(key, 0) != tensor.numel()
        ]
    return largest, where, problems


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Take a parallel layout down, so that a process can make the next one."""

import gc


def destroy_groups() -> None:
    """Destroy every process group but that of the world, and the threads with it; all ranks call it at once.

    Each gloo group has three threads, one of which wakes up a hundred times a second: some hundred groups that nobody
    uses any more keep both cores busy. Megatron's `destroy_model_parallel` forgets its groups only, and models hold
    them: Megatron's wrapper is held for ever by the hooks that it puts on autograd's nodes, so it is emptied.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel

    for wrapped in [found for found in gc.get_objects() if isinstance(found, DistributedDataParallel)]:
        vars(wrapped).clear()

    parallel_state.destroy_model_parallel()
    groups = torch.distributed.distributed_c10d._world.pg_map
    for group in [group for group in groups if group is not torch.distributed.group.WORLD]:
        torch.distributed.destroy_process_group(group)
    gc.collect()
    torch.distributed.barrier()

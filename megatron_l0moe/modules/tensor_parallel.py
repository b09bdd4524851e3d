"""What the ranks of a tensor-parallel group share: collectives of the gates, and random numbers that follow from a key.

Each collective is the identity in a group of one. The random numbers are the same on every rank of every layout,
without a state to save.
"""

import numpy as np
import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor


def keyed_generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator whose numbers follow from ``key`` alone, whichever rank draws them."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device=device).manual_seed(int(state) & (2**63 - 1))


def gather_shards(shard: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Concatenate equal shards over dimension 0 in rank order: [F/p] -> [F]; no gradient."""
    if group.size() == 1:
        return shard
    full = shard.new_empty((shard.shape[0] * group.size(), *shard.shape[1:]))
    torch.distributed.all_gather_into_tensor(full, shard.contiguous(), group=group)
    return full


def copy_to_shards(value: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Hand a value that all ranks hold to computations on their shards: forward identity, backward all-reduce."""
    if group.size() == 1:
        return value
    copied: Tensor = copy_to_tensor_model_parallel_region(value, group=group)
    return copied


def mean_over_shards(shard: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Return the mean over all F entries of a tensor sharded over ``group``; scalar.

    Forward all-reduces the partial sums, backward gives each rank the gradient of its own shard.
    """
    total = shard.sum()
    if group.size() > 1:
        total = reduce_from_tensor_model_parallel_region(total, group=group)
    return total / (shard.numel() * group.size())


def summed(values: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Sum in place over a group, and return it; no gradient."""
    if group.size() > 1:
        torch.distributed.all_reduce(values, group=group)
    return values

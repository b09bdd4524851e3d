"""Tells the routers which domains a micro-batch is from, in the steps whose load by domain is recorded.

Shapes: b = micro-batch. No rank sends anything: each reads the domains of its samples from the index.
"""

import contextlib
import functools
import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args
from torch import Tensor

from megatron_l0moe.index.dataset import SampleDomains
from megatron_l0moe.modules.router import L0Router
from megatron_l0moe.training.arguments import StageConfig
from megatron_l0moe.training.model import routers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Step:
    """One step of one model chunk."""

    routers: list[L0Router]
    domains: Iterator[Tensor]
    """int64 [b] for each micro-batch in its order, which is the same in every pipeline schedule."""


class DomainCounter:
    """Counts in each step whose number is 1 or a multiple of `l0_domain_load_interval`."""

    def __init__(self, stage: StageConfig) -> None:
        self._stage = stage
        self._index: SampleDomains | None = None
        self._steps: dict[int, _Step] = {}

    def begin_iteration(self, model: torch.nn.Module, iteration: int) -> None:
        """Prepare a step of a model chunk; `iteration` counts from 0. After the routers' own `begin_iteration`."""
        self._steps.pop(id(model), None)
        own = list(routers(model))
        if not own or not self._is_due(iteration + 1):
            return
        if self._index is None:
            self._index = SampleDomains(self._stage.l0_data_index)
        args = get_args()
        domains = self._index.of_rank(
            args.consumed_train_samples,
            num_micro_batches=get_num_microbatches(),
            micro_batch=args.micro_batch_size,
            rank=parallel_state.get_data_parallel_rank(),
            size=parallel_state.get_data_parallel_world_size(),
        )
        device = own[0].weight.device
        for router in own:
            router.domain_load.begin_iteration(self._index.num_domains, args.num_experts, device)
        # one copy to the device for the whole step: each copy waits for the device
        self._steps[id(model)] = _Step(own, itertools.cycle(torch.from_numpy(domains).to(device).unbind()))

    @contextlib.contextmanager
    def micro_batch(self, model: torch.nn.Module) -> Iterator[None]:
        """Around the forward pass of a model chunk's next micro-batch."""
        step = self._steps.get(id(model)) if model.training else None
        if step is None:
            yield
            return
        domains = next(step.domains)
        for router in step.routers:
            router.domain_load.domains = domains
        try:
            yield
        finally:
            for router in step.routers:
                router.domain_load.domains = None

    def _is_due(self, step: int) -> bool:
        interval = self._stage.l0_domain_load_interval
        if not interval or not self._stage.l0_data_index or not _is_in_index_order():
            return False
        return step == 1 or step % interval == 0


@functools.cache
def _is_in_index_order() -> bool:
    kind = get_args().dataloader_type
    if kind != "single":
        logger.warning("--dataloader-type %s does not follow the index; no load by domain is recorded.", kind)
    return bool(kind == "single")

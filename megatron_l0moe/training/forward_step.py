"""One micro-batch: its data, batch and loss, and the schedule's position of gates and routers.

The training data of a stage is the sample index, served to Megatron's own sampler. In the steps whose load by domain is
recorded, the routers are told which domains a micro-batch is from; no rank sends anything for it, since each reads the
domains of its samples from the index.

Shapes: b = micro-batch, s = sequence.
"""

import argparse
import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args
from megatron.training.utils import is_first_or_last_pipeline_stage
from torch import Tensor

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.index.dataset import CurriculumDataset, SampleDomains
from megatron_l0moe.index.index import check_batching
from megatron_l0moe.modules.hard_concrete import HardConcreteGate
from megatron_l0moe.modules.retention import GateStep, Phase, schedule_step
from megatron_l0moe.modules.router import L0Router
from megatron_l0moe.modules.trained_part import TrainedPart, parts
from megatron_l0moe.training.arguments import JobSettings, StageConfig

logger = logging.getLogger(__name__)


def datasets_provider(
    args: argparse.Namespace, num_samples: list[int], vp_stage: int | None = None
) -> tuple[Any, None, None]:
    """Return the train set; perplexity is measured on the exported model, so there are no others.

    Without a train set Megatron trains no step. That is the answer to a job that was killed after its last
    checkpoint and before its end was noted: the sampler refuses to begin behind the last sample.

    Args:
        args: Megatron's.
        num_samples: of train, validation and test set.
        vp_stage: model chunk, which Megatron demands to name; all chunks read the same samples.

    Raises:
        L0MoEError: the index is too short for the steps, or its batches do not fit the job.
    """
    prefix = args.l0_data_index
    if not prefix:
        raise L0MoEError(
            "--l0-data-index is required: the prefix of the sample index made by `l0moe curate`."
        )
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        return None, None, None
    if args.consumed_train_samples >= num_samples[0]:
        return None, None, None
    dataset = CurriculumDataset(
        Path(prefix),
        vocab_size=args.padded_vocab_size,
        seq_length=args.seq_length,
        verify=torch.distributed.get_rank() == 0,  # one rank reads the shards for their checksums
    )
    check_batching(
        dataset.header,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        data_parallel_size=args.data_parallel_size,
    )
    if len(dataset) < num_samples[0]:
        raise L0MoEError(
            f"The index {prefix} holds {len(dataset)} samples but --train-iters {args.train_iters} x "
            f"--global-batch-size {args.global_batch_size} needs {num_samples[0]}; train fewer steps or curate more."
        )
    return dataset, None, None


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
        own = list(parts(model, L0Router))
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


BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


class ForwardStep:
    """Megatron's `forward_step_func`; remembers, for each model chunk, the iteration that it has begun."""

    def __init__(self, settings: JobSettings, on_start: Callable[[], None] | None = None) -> None:
        """Keep the settings; `on_start` is called once, when the first micro-batch begins."""
        self._settings = settings
        self._on_start = on_start
        self._begun: dict[int, int] = {}
        self._domains = DomainCounter(settings.stage)

    def __call__(
        self, data_iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
        """Return the per-token losses [b, s] and the function that reduces them."""
        args = get_args()
        if self._on_start:
            self._on_start()
            self._on_start = None
        if model.training and self._begun.get(id(model)) != args.curr_iteration:
            begin_iteration(model, self._settings, iteration=args.curr_iteration, total=args.train_iters)
            self._domains.begin_iteration(model, args.curr_iteration)
            self._begun[id(model)] = args.curr_iteration
        batch = _get_batch(args, data_iterator, get_attr_wrapped_model(model, "vp_stage"))
        with self._domains.micro_batch(model):
            output = model(
                batch["tokens"],
                batch["position_ids"],
                None,
                labels=batch["labels"],
                loss_mask=batch["loss_mask"],
            )
        without_gradient = model.training and torch.is_grad_enabled() and not output.requires_grad
        if without_gradient and _trains(model, self._settings):
            raise L0MoEError(
                "No gradient reaches the trained parameters; remove --recompute-granularity full."
            )
        return output, functools.partial(_loss, batch["loss_mask"])


def _trains(model: torch.nn.Module, settings: JobSettings) -> bool:
    """Whether this step has a gradient for this model chunk.

    Not where all layers are frozen, as on a pipeline rank of dense layers, and with masks alone not in the steps whose
    gates are constants, open or frozen: those run forward only.
    """
    if settings.plan.stage == "expert" and settings.stage.l0_train_weights == "off":
        return any(gate.step.phase is Phase.LEARN for gate in parts(model, HardConcreteGate))
    return any(parameter.requires_grad for parameter in model.parameters())


def begin_iteration(model: torch.nn.Module, settings: JobSettings, *, iteration: int, total: int) -> None:
    """Begin an iteration in every gate and router of a model chunk."""

    def schedule(target: float) -> GateStep:
        return schedule_step(
            settings.plan.retention,
            iteration=iteration,
            total=total,
            target=target,
            penalty_scale=1.0 / get_num_microbatches(),
        )

    for part in parts(model, TrainedPart):
        part.begin_step(schedule)


def _get_batch(
    args: argparse.Namespace, data_iterator: Iterator[dict[str, Tensor]], vp_stage: int | None
) -> dict[str, Tensor | None]:
    """Return this rank's part of the next micro-batch; None for all on middle pipeline stages."""
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(BATCH_KEYS)
    batch: dict[str, Any] = {}
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    if tp_rank == 0:
        sample = next(data_iterator)
        batch = {key: sample[key].cuda(non_blocking=True) for key in BATCH_KEYS}
        batch["attention_mask"] = None
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
    )
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group()
    )
    return {key: batch.get(key) for key in BATCH_KEYS}


def _loss(loss_mask: Tensor | None, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the summed loss, the number of tokens, and both for the report; output and mask are [b, s]."""
    assert loss_mask is not None, "the last pipeline stage has the batch"
    mask = loss_mask.view(-1).float()
    loss = (output.view(-1).float() * mask).sum()
    tokens = mask.sum().detach().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}

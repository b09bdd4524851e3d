"""A simple model of a training step's time, good for ordering layouts. Nothing in it was measured.

A step of M micro-batches on P pipeline ranks with v chunks each takes

    (M + (P - 1) / v) * (computation + tensor- and expert-parallel messages of one micro-batch) + gradients

with the slowest pipeline rank's computation (Narayanan et al., arXiv:2104.04473, for the bubble). Computation runs at
fixed shares of the GPU's bf16 peak, an expert's no faster than its weights can be read; messages at a fixed share of
NVLink's or the network's bandwidth, whichever the group needs. Ranks are laid out as in Megatron: tensor first, then
context, expert or data, pipeline last.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_l0moe.planning.activations import Workload
from megatron_l0moe.planning.memory import rank_parameters
from megatron_l0moe.recipe.layout import Layout
from megatron_l0moe.sizes.flops import Part, StageModel, layer_flops, part_flops, parts
from megatron_l0moe.sizes.gpu_models import GPUS_PER_NODE, Gpu

DENSE_EFFICIENCY = 0.55
"""Share of the peak that large matrix products and attention reach: an assumption."""
EXPERT_EFFICIENCY = 0.35
"""The same for grouped products of narrow experts, sorting of tokens included: an assumption."""
LINK_EFFICIENCY = 0.7
"""Share of a link's bandwidth that collectives reach: an assumption."""
GRADIENT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step, and what they are made of."""

    computation: float
    tensor: float
    """Messages of tensor and sequence parallelism."""
    expert: float
    """Tokens to their experts and back."""
    pipeline: float
    """Idle time, and messages between pipeline ranks."""
    gradients: float
    """Reduction of gradients and gathering of weights that computation does not hide."""
    flops: float
    """Model FLOPs of the step."""
    peak: float
    """FLOP/s of all GPUs."""

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.computation + self.tensor + self.expert + self.pipeline + self.gradients

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, recomputation not counted as work."""
        return self.flops / (self.seconds * self.peak)


def step_time(model: StageModel, layout: Layout, workload: Workload, gpu: Gpu) -> StepTime:
    """Return the time of one step."""
    tokens = workload.micro_batch * workload.seq_length / (layout.tensor * layout.context)
    ranks = [parts(model, layout, rank) for rank in range(layout.pipeline)]
    computation = max(_computation(model, layout, held, workload, gpu) for held in ranks)
    messages = [_messages(model, layout, workload, gpu, held) for held in ranks]
    tensor, expert = (max(column) for column in zip(*messages, strict=True))
    one = computation + tensor + expert
    count = workload.micro_batches(layout)
    idle = (layout.pipeline - 1) / layout.virtual_pipeline
    hand_over = 0.0
    if layout.pipeline > 1:
        boundary = tokens * model.architecture.hidden_size * workload.element_bytes
        link = _link(gpu, layout.processes // layout.pipeline * 2)
        hand_over = count * 2 * layout.virtual_pipeline * boundary / link
    per_step = workload.global_batch * workload.seq_length
    flops = [part_flops(model, part, workload.seq_length, workload.recompute) for r in ranks for part in r]
    return StepTime(
        computation=count * computation,
        tensor=count * tensor,
        expert=count * expert,
        pipeline=idle * one + hand_over,
        gradients=_gradients(model, layout, workload, gpu, one),
        flops=per_step * sum(part.model for part in flops),
        peak=layout.processes * gpu.bf16_flops,
    )


def _computation(
    model: StageModel, layout: Layout, held: Sequence[Part], workload: Workload, gpu: Gpu
) -> float:
    """Return the seconds of a micro-batch on a GPU of a pipeline rank; few rows for an expert wait for its weights."""
    tokens = workload.micro_batch * workload.seq_length / (layout.tensor * layout.context)
    work = sum(part_flops(model, part, workload.seq_length, workload.recompute).executed for part in held)
    if model.stage == "expert":
        return tokens * work / (DENSE_EFFICIENCY * gpu.bf16_flops)
    layer = layer_flops(model, workload.seq_length, upper=True)
    passes = (4.0 if workload.recompute.redoes("moe") else 3.0) * sum(part.upper for part in held)
    read = workload.element_bytes * model.experts_weights / (layout.expert * layout.etp)
    one = max(tokens * layer.experts / (EXPERT_EFFICIENCY * gpu.bf16_flops), read / gpu.memory_bandwidth)
    return tokens * (work - passes * layer.experts) / (DENSE_EFFICIENCY * gpu.bf16_flops) + passes * one


def _messages(
    model: StageModel, layout: Layout, workload: Workload, gpu: Gpu, held: Sequence[Part]
) -> tuple[float, float]:
    """Return the seconds of tensor-parallel and of expert-parallel messages of one micro-batch."""
    t, recompute = layout.tensor, workload.recompute
    layers: float = sum(part.layers for part in held)
    upper = sum(part.upper for part in held)
    if model.stage == "expert" and not recompute.redoes("mlp"):
        layers = upper + sum(part.dense for part in held) / 3  # no backward pass below
    whole = workload.micro_batch * workload.seq_length / layout.context
    whole *= model.architecture.hidden_size * workload.element_bytes
    # Each of attention and FFN gathers and scatters the sequence forwards (2), and backwards, where it is gathered a
    # second time for the weights' gradients (3).
    backward = 3 if model.stage == "moe" else 2
    passes = 2 + backward + (2 if recompute.full else 0)
    ffns = layers - upper if model.stage == "moe" else layers
    tensor = (layers + ffns) * passes * whole * (t - 1) / t / _link(gpu, t)
    if model.stage == "expert":
        return tensor, 0.0
    again = 1 if recompute.redoes("moe") else 0
    rows = whole / t * model.counts.top_k  # bytes that this rank's tokens send
    group = layout.expert * layout.etp
    exchange = rows * (layout.expert - 1) / layout.expert / _link(gpu, group)
    gather = rows * (layout.etp - 1) / _link(gpu, layout.etp)
    return tensor, upper * 2 * (2 + again) * (exchange + gather)


def _gradients(model: StageModel, layout: Layout, workload: Workload, gpu: Gpu, one: float) -> float:
    """Return the seconds of reducing gradients and gathering weights; overlapped, one micro-batch hides them."""
    replicas = layout.data * layout.context
    expert_replicas = max(layout.processes // layout.expert_product, 1)
    slowest = 0.0
    for rank in range(layout.pipeline):
        counts = rank_parameters(model, layout, rank)
        width = GRADIENT_BYTES + workload.element_bytes
        dense = (counts.trained_dense + counts.gates) * width * (replicas - 1) / replicas
        experts = counts.trained_experts * width * (expert_replicas - 1) / expert_replicas
        seconds = dense / _link(gpu, layout.tensor * replicas)
        seconds += experts / _link(gpu, layout.etp * layout.expert * expert_replicas)
        slowest = max(slowest, seconds)
    return max(slowest - one, 0.0) if workload.overlaps_gradients else slowest


def _link(gpu: Gpu, ranks: int) -> float:
    """Return the bandwidth that a group of so many neighbouring ranks has, in bytes/s."""
    return LINK_EFFICIENCY * (gpu.nvlink if ranks <= GPUS_PER_NODE else gpu.network)

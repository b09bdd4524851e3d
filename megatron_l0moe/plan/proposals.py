"""Layouts of a number of GPUs: those that fit into memory, fastest first, and why the others do not.

Tried are all even splits with tensor parallelism inside a node, the distributed optimizer, and three kinds of
recomputation, at the recipe's micro-batch. Rules are those of `layout_rules.py`, memory that of `memory.py`. Time is
that of a simple model, good for ordering layouts, in which nothing was measured. A step of M micro-batches on P
pipeline ranks with v chunks each takes

    (M + (P - 1) / v) * (computation + tensor- and expert-parallel messages of one micro-batch) + gradients

with the slowest pipeline rank's computation (Narayanan et al., arXiv:2104.04473, for the bubble). Computation runs at
fixed shares of the GPU's bf16 peak, an expert's no faster than its weights can be read; messages at a fixed share of
NVLink's or the network's bandwidth, whichever the group needs. Ranks are laid out as in Megatron: tensor first, then
context, expert or data, pipeline last.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_l0moe.plan.memory import Memory, Workload, peak_memory, rank_parameters
from megatron_l0moe.recipe.layout import Layout
from megatron_l0moe.recipe.layout_rules import JobSizes, Names, problem
from megatron_l0moe.sizes.flops import PipelinePart, Recompute, StageModel, layer_flops, part_flops, parts
from megatron_l0moe.sizes.gpu_models import GIB, GPUS_PER_NODE, Gpu

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
    model: StageModel, layout: Layout, held: Sequence[PipelinePart], workload: Workload, gpu: Gpu
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
    model: StageModel, layout: Layout, workload: Workload, gpu: Gpu, held: Sequence[PipelinePart]
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


MAX_PIPELINE = 8
CHUNKS = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """A training stage: `jobs` independent runs of the same model."""

    model: StageModel
    workload: Workload
    sizes: JobSizes
    names: Names
    steps: int
    jobs: int = 1


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout with its recomputation, its memory and its time."""

    layout: Layout
    recompute: Recompute
    memory: Memory
    time: StepTime
    at_once: int
    """Jobs that run side by side."""
    hours: float
    """The hours of the whole stage."""

    @property
    def text(self) -> str:
        """Layout and recomputation, as a message names them."""
        return f"{self.layout.text}, recomputation {self.recompute.text}"


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A layout that does not fit into memory, and the nearest one that does."""

    candidate: Candidate
    excess: float
    """Bytes above what the GPU has."""
    instead: Candidate | None


@dataclass(frozen=True, kw_only=True)
class Proposals:
    """What was found for a stage."""

    fitting: tuple[Candidate, ...]
    """Fastest first, one for each layout: that with the recomputation which is fastest."""
    all_fitting: tuple[Candidate, ...]
    """Fastest first, with every recomputation."""
    refused: tuple[Refused, ...]
    """The refused candidates, those that would be fastest first, one for each layout: that with the least memory."""
    broken: tuple[tuple[str, int], ...]
    """Rules that other layouts break, an example of each, and how many break it."""


def propose(job: PlannedJob, gpu: Gpu, gpus: int) -> Proposals:
    """Try the layouts of so many GPUs."""
    broken: Counter[str] = Counter()
    examples: dict[str, str] = {}
    found: list[Candidate] = []
    for layout in _layouts(job, gpus):
        if reason := problem(layout, job.sizes, job.names):
            rule = "".join("#" if c.isdigit() else c for c in reason.split(",")[0])
            broken[rule] += 1
            examples.setdefault(rule, reason)
            continue
        found += [evaluate(job, layout, recompute, gpu, gpus) for recompute in recomputations(job.model)]
    fits = sorted((c for c in found if c.memory.total <= gpu.usable), key=lambda c: c.hours)
    kept = {c.layout for c in fits}
    rest = sorted((c for c in found if c.layout not in kept), key=lambda c: c.memory.total)
    refused = [refuse(c, fits, gpu) for c in _one_each(rest)]
    return Proposals(
        fitting=tuple(_one_each(fits)),
        all_fitting=tuple(fits),
        refused=tuple(sorted(refused, key=lambda r: r.candidate.hours)),
        broken=tuple((examples[rule], count) for rule, count in broken.most_common()),
    )


def evaluate(job: PlannedJob, layout: Layout, recompute: Recompute, gpu: Gpu, gpus: int) -> Candidate:
    """Return memory and time of a layout of one job, on `gpus` GPUs for all jobs."""
    workload = dataclasses.replace(job.workload, recompute=recompute)
    time = step_time(job.model, layout, workload, gpu)
    at_once = max(min(gpus // layout.processes, job.jobs), 1)
    return Candidate(
        layout=layout,
        recompute=recompute,
        memory=peak_memory(job.model, layout, workload),
        time=time,
        at_once=at_once,
        hours=math.ceil(job.jobs / at_once) * job.steps * time.seconds / 3600,
    )


def refuse(candidate: Candidate, fitting: Sequence[Candidate], gpu: Gpu) -> Refused:
    """Return by how much a layout is too large, and the nearest that fits."""
    near = min(fitting, key=lambda other: (_changes(candidate, other), other.hours), default=None)
    return Refused(candidate=candidate, excess=candidate.memory.total - gpu.usable, instead=near)


def refusal_text(refused: Refused, gpu: Gpu) -> str:
    """Word why a layout does not fit and what would, as clauses without a full stop."""
    memory = refused.candidate.memory
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations + memory.working,
    }
    detail = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    text = (
        f"{refused.candidate.text} needs {memory.total / GIB:.1f} GiB a GPU ({detail}), {refused.excess / GIB:.1f} "
        f"more than the {gpu.usable / GIB:.1f} that an {gpu.name} has for them"
    )
    if refused.instead is None:
        return f"{text}; no layout of these GPUs fits, so take more GPUs or a smaller micro-batch"
    instead = refused.instead
    return f"{text}; the nearest that fits is {instead.text} ({instead.memory.total / GIB:.1f} GiB)"


def recomputations(model: StageModel) -> tuple[Recompute, ...]:
    """Return the kinds of recomputation that are tried."""
    module = "moe" if model.stage == "moe" else "mlp"
    return (
        Recompute(),
        Recompute(granularity="selective", modules=(module,)),
        Recompute(granularity="full"),
    )


def _layouts(job: PlannedJob, gpus: int) -> Iterator[Layout]:
    is_moe = job.model.stage == "moe"
    # One of several jobs gets more than a node only where there are more GPUs than jobs.
    largest = max(GPUS_PER_NODE, 2 * gpus // job.jobs)
    worlds = [gpus] if job.jobs == 1 else [n for n in _divisors(gpus) if n <= largest]
    experts = _divisors(job.model.counts.num_experts) if is_moe else [1]
    for world, tensor in itertools.product(worlds, (1, 2, 4, 8)):
        pipelines = [n for n in _divisors(world) if n <= min(MAX_PIPELINE, job.model.architecture.num_layers)]
        for pipeline, expert in itertools.product(pipelines, experts):
            if tensor > GPUS_PER_NODE or world % (tensor * pipeline):
                continue
            for etp, chunks in itertools.product({1, tensor}, CHUNKS if pipeline > 1 else (1,)):
                if world % (etp * expert * pipeline):
                    continue
                yield Layout(
                    processes=world,
                    tensor=tensor,
                    sequence=tensor > 1,
                    pipeline=pipeline,
                    virtual_pipeline=chunks,
                    expert=expert,
                    expert_tensor=None if etp == tensor or not is_moe else etp,
                    distributed_optimizer=True,
                )
                if not is_moe:
                    break


def _one_each(candidates: list[Candidate]) -> list[Candidate]:
    """Keep the first candidate of each layout."""
    first: dict[Layout, Candidate] = {}
    for candidate in candidates:
        first.setdefault(candidate.layout, candidate)
    return list(first.values())


def _changes(one: Candidate, other: Candidate) -> float:
    """Return how many settings differ, sizes by powers of two; what leaves the ranks' shares alone counts half."""
    sizes = ("processes", "tensor", "pipeline", "virtual_pipeline", "expert", "etp", "context")
    far = sum(abs(math.log2(getattr(one.layout, n) / getattr(other.layout, n))) for n in sizes)
    switched = one.layout.distributed_optimizer != other.layout.distributed_optimizer
    return far + 0.5 * (switched + (one.recompute != other.recompute))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]

"""Layouts of a number of GPUs: those that fit into memory, fastest first, and why the others do not.

Tried are all even splits with tensor parallelism inside a node, the distributed optimizer, and three kinds of
recomputation, at the recipe's micro-batch. Rules are those of `layout_rules.py`, memory that of `memory.py`, time that
of `cost.py`.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_l0moe.planning.activations import Workload
from megatron_l0moe.planning.cost import StepTime, step_time
from megatron_l0moe.planning.memory import Memory, peak_memory
from megatron_l0moe.recipe.layout import Layout
from megatron_l0moe.recipe.layout_rules import JobSizes, Names, problem
from megatron_l0moe.sizes.flops import Recompute, StageModel
from megatron_l0moe.sizes.gpu_models import GIB, GPUS_PER_NODE, Gpu

MAX_PIPELINE = 8
CHUNKS = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Job:
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
    """Of the whole stage."""

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
    """Those that would be fastest first, one for each layout: that with the least memory."""
    broken: tuple[tuple[str, int], ...]
    """Rules that other layouts break, an example of each, and how many break it."""


def propose(job: Job, gpu: Gpu, gpus: int) -> Proposals:
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


def evaluate(job: Job, layout: Layout, recompute: Recompute, gpu: Gpu, gpus: int) -> Candidate:
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


def _layouts(job: Job, gpus: int) -> Iterator[Layout]:
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

"""What a parallel layout must obey, said before any process is started or any process group is made.

The same rules serve recipes (names such as `moe_training.parallel.tensor`) and torchrun commands written by hand
(`--tensor-model-parallel-size`). Sources: megatron-core 0.19.2, `training/arguments.py`,
`core/transformer/transformer_config.py`, `core/transformer/moe/moe_layer.py`, `core/parallel_state.py`.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.layout import Layout

Names = Mapping[str, str]
"""How a message calls each number: fields of `Layout` and of `JobSizes` to names that the user wrote."""


@dataclass(frozen=True, kw_only=True)
class JobSizes:
    """Sizes of the model and the batch that a layout has to divide; None: not known, so not checked."""

    layers: int | None = None
    heads: int | None = None
    query_groups: int | None = None
    ffn: int | None = None
    vocab: int | None = None
    vocab_multiple: int = 1
    """The embedding is padded to a multiple of this times the tensor-parallel size."""
    experts: int | None = None
    """Experts of a layer; 0: a dense model."""
    expert_ffn: int | None = None
    seq_length: int | None = None
    micro_batch: int | None = None
    global_batch: int | None = None
    has_gpu: bool | None = None


MOST_SHAPES = 4_000
"""Combinations of sizes that the search for the nearest layout looks at."""


def check_layout(layout: Layout, sizes: JobSizes, names: Names) -> None:
    """Refuse a layout that cannot work.

    Raises:
        L0MoEError: one sentence with the numbers, and the nearest layout that works.
    """
    if found := refusal(layout, sizes, names):
        raise L0MoEError(f"{found}.")


def refusal(layout: Layout, sizes: JobSizes, names: Names) -> str | None:
    """Return why a layout cannot work and the nearest one that can, as clauses without a full stop, or None."""
    found = problem(layout, sizes, names)
    return found and f"{found}; {_advice(layout, sizes)}"


def problem(layout: Layout, sizes: JobSizes, names: Names) -> str | None:
    """Return the first broken rule as a clause, or None."""
    return next((found for rule in RULES if (found := rule(layout, sizes, names))), None)


def nearest_layout(layout: Layout, sizes: JobSizes) -> Layout | None:
    """Return the layout with the fewest and smallest changes that breaks no rule; None: not with this batch.

    On the same number of processes if there is one, else on a number as close as possible, at most twice as many.
    """
    if sizes.global_batch and sizes.micro_batch and sizes.global_batch % sizes.micro_batch:
        return None
    world_of = _nearest_worlds(layout, sizes)
    found = [(world, shape) for shape in _shapes(layout, sizes) if (world := world_of(shape))]
    nearest = min((world for world, _ in found), key=lambda world: _far(world, layout), default=None)
    candidates = (shape.on(world) for world, shape in found if world == nearest)
    return min(candidates, key=lambda candidate: _distance(candidate, layout), default=None)


def _world(layout: Layout, sizes: JobSizes, n: Names) -> str | None:
    if layout.processes % layout.dense_product == 0 and layout.processes % layout.expert_product == 0:
        return None
    return (
        f"{n['processes']} ({layout.processes}) must be divisible by tensor * pipeline * context ({layout.tensor} * "
        f"{layout.pipeline} * {layout.context} = {layout.dense_product}) and by expert-tensor * expert * pipeline "
        f"({layout.etp} * {layout.expert} * {layout.pipeline} = {layout.expert_product})"
    )


def _experts(layout: Layout, sizes: JobSizes, n: Names) -> str | None:
    if sizes.experts == 0 and layout.expert > 1:
        return f"{n['expert']} ({layout.expert}) must be 1, since this stage trains a dense model"
    if sizes.experts and sizes.experts % layout.expert:
        return f"{n['experts']} ({sizes.experts}) must be divisible by {n['expert']} ({layout.expert})"
    return None


def _expert_width(layout: Layout, sizes: JobSizes, n: Names) -> str | None:
    if sizes.experts and sizes.expert_ffn and sizes.expert_ffn % layout.etp:
        name = n["tensor" if layout.expert_tensor is None else "expert_tensor"]
        return f"{n['expert_ffn']} ({sizes.expert_ffn}) must be divisible by {name} ({layout.etp})"
    return None


def _tensor(layout: Layout, sizes: JobSizes, n: Names) -> str | None:
    for what, number in (
        ("attention heads", sizes.heads),
        ("KV heads", sizes.query_groups),
        ("FFN channels", sizes.ffn),
    ):
        if number and number % layout.tensor:
            return f"{n['tensor']} ({layout.tensor}) must divide the model's {number} {what}"
    return None


def _vocabulary(layout: Layout, sizes: JobSizes, n: Names) -> str | None:
    """Rows that are added in this layout and not in one process would take part in the softmax."""
    if not sizes.vocab:
        return None
    alone, here = (
        math.ceil(sizes.vocab / multiple) * multiple
        for multiple in (sizes.vocab_multiple, sizes.vocab_multiple * layout.tensor)
    )
    if alone == here:
        return None
    return (
        f"{n['tensor']} ({layout.tensor}) must divide the vocabulary of {sizes.vocab} without padding, which here adds "
        f"{here - alone} random rows to the embedding's {alone}"
    )


def _sequence(layout: Layout, sizes: JobSizes, n: Names) -> str | None:
    if sizes.experts and layout.tensor > 1 and not layout.sequence:
        return (
            f"{n['tensor']} ({layout.tensor}) with {n['experts']} ({sizes.experts}) needs {n['sequence']}, since an "
            "MoE layer gives each tensor-parallel rank tokens of its own"
        )
    parts = (layout.tensor if layout.sequence else 1) * (2 * layout.context if layout.context > 1 else 1)
    if sizes.seq_length and sizes.seq_length % parts:
        return (
            f"{n['seq_length']} ({sizes.seq_length}) must be divisible by the {parts} parts into which "
            f"{n['tensor']} ({layout.tensor}) and {n['context']} ({layout.context}) cut a sequence"
        )
    return None


def _context(layout: Layout, sizes: JobSizes, n: Names) -> str | None:
    if layout.context > 1 and sizes.has_gpu is False:
        return (
            f"{n['context']} ({layout.context}) must be 1 without a GPU, since only Transformer Engine's attention can "
            "split a sequence"
        )
    return None


def _virtual(layout: Layout, sizes: JobSizes, n: Names) -> str | None:
    if layout.virtual_pipeline == 1:
        return None
    if layout.pipeline == 1:
        return f"{n['virtual_pipeline']} ({layout.virtual_pipeline}) needs {n['pipeline']} (1) above 1"
    if layout.pipeline == 2 and not layout.overlap_p2p:
        return (
            f"{n['virtual_pipeline']} ({layout.virtual_pipeline}) on {n['pipeline']} (2) needs overlapped pipeline "
            "messages, since in a batch the messages of the two neighbours, which are one rank, are exchanged"
        )
    return None


def _layers(layout: Layout, sizes: JobSizes, n: Names) -> str | None:
    split = layout.pipeline_layers
    if layout.uneven or not (sizes.layers or split):
        return None
    if not split and sizes.layers and sizes.layers % layout.stages:
        stages = f"{n['pipeline']} ({layout.pipeline})"
        if layout.virtual_pipeline > 1:
            stages += f" * {n['virtual_pipeline']} ({layout.virtual_pipeline})"
        return (
            f"{stages} must divide the model's {sizes.layers} layers, or {n['pipeline_layers']} must say how many each "
            "stage takes"
        )
    if split and (len(split) != layout.stages or sum(split) != (sizes.layers or sum(split))):
        total = f", with the sum {sizes.layers}" if sizes.layers else ""
        given = "+".join(map(str, split))
        return f"{n['pipeline_layers']} ({given}) must be {layout.stages} numbers, one a stage{total}"
    return None


def _batch(layout: Layout, sizes: JobSizes, n: Names) -> str | None:
    if not sizes.global_batch or not sizes.micro_batch:
        return None
    step = sizes.micro_batch * layout.data
    if sizes.global_batch % step:
        return (
            f"{n['global_batch']} ({sizes.global_batch}) must be divisible by {n['micro_batch']} * data-parallel size "
            f"({sizes.micro_batch} * {layout.data} = {step})"
        )
    micro_batches = sizes.global_batch // step
    if layout.virtual_pipeline > 1 and micro_batches % layout.pipeline:
        return (
            f"{n['virtual_pipeline']} ({layout.virtual_pipeline}) needs micro-batches in groups of {n['pipeline']} "
            f"({layout.pipeline}), not {micro_batches} ({n['global_batch']} {sizes.global_batch} / {step})"
        )
    return None


Rule = Callable[[Layout, JobSizes, Names], str | None]
RULES: tuple[Rule, ...] = (
    _experts,
    _expert_width,
    _tensor,
    _vocabulary,
    _sequence,
    _context,
    _virtual,
    _layers,
    _world,
    _batch,
)


class _NoNames(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return key


_NO_NAMES: Names = _NoNames()


def _advice(layout: Layout, sizes: JobSizes) -> str:
    found = nearest_layout(layout, sizes)
    if found is None:
        step = sizes.micro_batch or 1
        batch = max(round((sizes.global_batch or step) / step), 1) * step
        return f"no layout works with this batch, the nearest one that does is {batch}"
    processes = f"{found.processes} process{'es' if found.processes > 1 else ''}"
    return f"the nearest layout that works is {found.text} ({processes})"


@dataclass(frozen=True)
class _Shape:
    """A layout but for its number of processes, in two parts that keep the rules which each breaks alone."""

    inside: Layout
    """Gives tensor, sequence, context and expert_tensor."""
    pipeline: Layout
    """Gives all that begins with pipeline, virtual_pipeline, uneven and overlap_p2p."""
    expert: int
    smallest_world: int

    @property
    def copy(self) -> int:
        """Processes of one copy of the dense part of the model."""
        return self.inside.tensor * self.inside.context * self.pipeline.pipeline

    @property
    def group(self) -> int:
        """Number of micro-batches that go through the pipeline together."""
        return self.pipeline.pipeline if self.pipeline.virtual_pipeline > 1 else 1

    def on(self, processes: int) -> Layout:
        """Return the whole layout."""
        part = self.inside
        return dataclasses.replace(
            self.pipeline,
            processes=processes,
            tensor=part.tensor,
            sequence=part.sequence,
            context=part.context,
            expert_tensor=part.expert_tensor,
            expert=self.expert,
        )


def _shapes(layout: Layout, sizes: JobSizes) -> Iterator[_Shape]:
    """Yield what may hold on at most twice the layout's processes, without what breaks a rule on any number."""
    most = 2 * layout.processes
    near = functools.partial(sorted, key=lambda part: _distance(part, layout))
    inside, stages = near(_inside_shapes(layout, sizes, most)), near(_pipelines(layout, sizes, most))
    experts = near(
        dataclasses.replace(layout, expert=n) for n in {1, layout.expert, *_divisors(sizes.experts, most)}
    )
    allowed = [part.expert for part in experts if not _experts(part, sizes, _NO_NAMES)]
    # Cut off only where tensor, pipeline and expert have dozens of divisors each, and then far from the layout.
    for cut, part, expert in itertools.islice(itertools.product(stages, inside, allowed), MOST_SHAPES):
        smallest = cut.pipeline * math.lcm(part.tensor * part.context, part.etp * expert)
        if smallest <= most:
            yield _Shape(part, cut, expert, smallest)


def _inside_shapes(layout: Layout, sizes: JobSizes, most: int) -> Iterator[Layout]:
    """Yield the ways to share a layer; where the model is not known, tensor parallelism is kept or given up."""
    tensors = {1, layout.tensor, *_divisors(sizes.heads, most)}
    for tensor, context in itertools.product(tensors, {1, layout.context}):
        ways = {None} if layout.expert_tensor is None else {None, 1, layout.expert_tensor} - {tensor}
        for shared, sequence in itertools.product(ways, {layout.sequence and tensor > 1, tensor > 1}):
            found = dataclasses.replace(
                layout, tensor=tensor, context=context, expert_tensor=shared, sequence=sequence
            )
            rules: tuple[Rule, ...] = (_tensor, _vocabulary, _expert_width, _sequence, _context)
            if not any(rule(found, sizes, _NO_NAMES) for rule in rules):
                yield found


def _pipelines(layout: Layout, sizes: JobSizes, most: int) -> Iterator[Layout]:
    """Yield the ways to cut the layers; where they are not known, the pipeline is kept or given up."""
    split, layers = layout.pipeline_layers, sizes.layers
    for pipeline in {1, layout.pipeline, *_divisors(layers, most), *_divisors(layers and len(split), most)}:
        chunks = {
            1,
            layout.virtual_pipeline,
            *_divisors(layers and layers // pipeline, layout.virtual_pipeline),
        }
        if split and len(split) // pipeline <= layout.virtual_pipeline:
            chunks.add(max(len(split) // pipeline, 1))
        switches = itertools.product({layout.overlap_p2p, True}, {split, ()})
        for number, (overlap, layers_of) in itertools.product(
            chunks if pipeline > 1 else {1}, list(switches)
        ):
            found = dataclasses.replace(
                layout,
                pipeline=pipeline,
                virtual_pipeline=number,
                pipeline_layers=layers_of,
                uneven=layout.uneven and pipeline == layout.pipeline,
                overlap_p2p=overlap or number == 1,
            )
            if not (_virtual(found, sizes, _NO_NAMES) or _layers(found, sizes, _NO_NAMES)):
                yield found


def _distance(one: Layout, other: Layout) -> tuple[float, str]:
    """Return how far two layouts are apart: factors between their sizes in powers of two, one half a switch."""
    sizes = ("tensor", "pipeline", "virtual_pipeline", "expert", "etp", "context")
    far = sum(abs(math.log2(getattr(one, name) / getattr(other, name))) for name in sizes)
    switches = ("sequence", "overlap_p2p", "pipeline_layers")
    changed = sum(getattr(one, name) != getattr(other, name) for name in switches)
    return far + 0.5 * changed, one.text


def _nearest_worlds(layout: Layout, sizes: JobSizes) -> Callable[[_Shape], int | None]:
    """Return what finds the nearest number of processes, up to twice the layout's, on which a shape may run."""
    most = 2 * layout.processes
    batches = sizes.global_batch // sizes.micro_batch if sizes.global_batch and sizes.micro_batch else None
    replicas = _divisors(batches, most)

    @functools.cache
    def nearest(copy: int, smallest: int, group: int) -> int | None:
        if batches is None:
            below = layout.processes // smallest * smallest
            worlds = [below, below + smallest]
        else:
            worlds = [copy * n for n in replicas if copy * n % smallest == 0 and batches // n % group == 0]
        return min((n for n in worlds if 0 < n <= most), key=lambda n: _far(n, layout), default=None)

    return lambda shape: nearest(shape.copy, shape.smallest_world, shape.group)


def _far(world: int, layout: Layout) -> tuple[float, int]:
    """Return how far a number of processes is from the layout's; of two that are as far, the larger is nearer."""
    return abs(math.log2(world / layout.processes)), -world


def _divisors(number: int | None, most: int) -> list[int]:
    """Return the divisors of a number, up to `most`; none of a number that is not known or 0."""
    return [n for n in range(1, min(number, most) + 1) if number % n == 0] if number else []

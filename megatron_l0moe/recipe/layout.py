"""A parallel layout of one training job, and its short text form: `tp2,sp;ep2;pp2` names three layouts.

| word | meaning |
|---|---|
| tpN | tensor parallelism over N ranks |
| sp | sequence parallelism: the tensor-parallel ranks split the sequence between their matrices |
| ppN | N pipeline ranks |
| vpN | N model chunks on each pipeline rank (virtual pipeline) |
| layersA+B | layers of each pipeline stage, for an uneven split |
| batched-p2p | pipeline messages sent in batches, not overlapped with computation |
| epN | the experts of a layer spread over N ranks |
| etpN | each expert split over N ranks; without it as many as tensor parallelism |
| cpN | context parallelism over N ranks |
| dpN | N data-parallel replicas; without it as few as the other sizes allow |
| distopt | optimizer state spread over the data-parallel ranks |
| alltoall, allgather | how tokens travel to their experts; without it what the machine takes |

The word `one` is one process. Rules are in `layout_rules.py`.

A recipe has a layout for each training section, and `layouts` and `gpus`: what changes with the number of GPUs, and
which number it is. A block of `layouts` holds only what does not change a stage's result, so a run may go on on another
number of GPUs. It is put into the training sections when the recipe is loaded; after that a recipe with layouts is like
one without. Megatron's flags of a layout are made here too.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from megatron_l0moe.errors import L0MoEError, nearest
from megatron_l0moe.recipe.yaml_file import Settings, check_option_name

Flag = bool | int | float | str
MOST_PROCESSES = 2**17
"""Of one job, and GPUs of a run, the most there may be: more than any cluster has. Such bounds keep a slip from being
counted through."""
MOST_EXPERTS = 4096
MOST_CHUNKS = 1024
"""Pieces of a pipeline."""
MOST = 2**31 - 1
Count = Annotated[int, Field(ge=1, le=MOST)]
Processes = Annotated[int, Field(ge=1, le=MOST_PROCESSES)]


def _check_flags(flags: dict[str, Flag]) -> dict[str, Flag]:
    for name, value in flags.items():
        if name.startswith("-") or "_" in name:
            raise ValueError(
                f"flag {name!r} must be written without leading dashes and with '-' between words; "
                f"write {name.lstrip('-').replace('_', '-')!r}"
            )
        check_option_name(name)
        if value is False:
            raise ValueError(f"flag {name!r} is false, which means nothing on a command line; remove it")
        if isinstance(value, str) and value.startswith("-"):
            raise ValueError(
                f"flag {name!r} has the value {value!r}, which begins with '-' and would be another flag"
            )
    return flags


Flags = Annotated[dict[str, Flag], AfterValidator(_check_flags)]


class RecipePart(Settings):
    """Base of a recipe and of its sections."""


SIZES = {
    "tp": "tensor",
    "pp": "pipeline",
    "vp": "virtual_pipeline",
    "ep": "expert",
    "etp": "expert_tensor",
    "cp": "context",
    "dp": "data",
}
FLAGS = {
    "tensor": "tensor-model-parallel-size",
    "sequence": "sequence-parallel",
    "pipeline": "pipeline-model-parallel-size",
    "virtual_pipeline": "num-virtual-stages-per-pipeline-rank",
    "pipeline_layers": "pipeline-model-parallel-layout",
    "overlap_p2p": "no-overlap-p2p-communication",
    "expert": "expert-model-parallel-size",
    "expert_tensor": "expert-tensor-parallel-size",
    "context": "context-parallel-size",
    "distributed_optimizer": "use-distributed-optimizer",
    "dispatcher": "moe-token-dispatcher-type",
}
"""Megatron's flag of each field of a layout."""
SWITCHES = {"sp": "sequence", "distopt": "distributed_optimizer"}
DISPATCHERS = ("alltoall", "allgather")
BATCHED = "batched-p2p"
ONE = "one"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the processes of one job share a model and its data."""

    processes: int = 1
    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    virtual_pipeline: int = 1
    """Model chunks of each pipeline rank."""
    pipeline_layers: tuple[int, ...] = ()
    """Layers of each of the pipeline * virtual_pipeline stages; empty: the same number in all."""
    uneven: bool = False
    """An uneven split was given by flags of Megatron that we do not read; it checks them itself."""
    overlap_p2p: bool = True
    expert: int = 1
    expert_tensor: int | None = None
    """Ranks that share one expert; None: as many as `tensor`, as in Megatron."""
    context: int = 1
    distributed_optimizer: bool = False
    dispatcher: str | None = None
    """`alltoall` or `allgather`; None: what the machine takes."""

    @property
    def etp(self) -> int:
        """Ranks that share one expert."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    @property
    def dense_product(self) -> int:
        """Ranks of one copy of the dense part of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def expert_product(self) -> int:
        """Ranks of one copy of all experts."""
        return self.etp * self.expert * self.pipeline

    @property
    def data(self) -> int:
        """Data-parallel size of the dense part, rounded down."""
        return self.processes // self.dense_product

    @property
    def stages(self) -> int:
        """Pieces into which the layers are cut."""
        return self.pipeline * self.virtual_pipeline

    @property
    def text(self) -> str:
        """The short form; `parse_layout` of it gives this layout."""
        words = {
            f"tp{self.tensor}": self.tensor > 1,
            "sp": self.sequence,
            f"cp{self.context}": self.context > 1,
            f"pp{self.pipeline}": self.pipeline > 1,
            f"vp{self.virtual_pipeline}": self.virtual_pipeline > 1,
            "layers" + "+".join(map(str, self.pipeline_layers)): bool(self.pipeline_layers),
            BATCHED: not self.overlap_p2p,
            f"ep{self.expert}": self.expert > 1,
            f"etp{self.etp}": self.etp != self.tensor,
            self.dispatcher or "": self.dispatcher is not None,
            f"dp{self.data}": self.processes != smallest_world(self),
            "distopt": self.distributed_optimizer,
        }
        return ",".join(word for word, is_said in words.items() if is_said) or ONE


ONE_PROCESS = Layout()


def smallest_world(layout: Layout) -> int:
    """Return the smallest number of processes that holds whole copies of the dense part and of the experts."""
    return math.lcm(layout.dense_product, layout.expert_product)


def parse_layouts(text: str) -> list[Layout]:
    """Read layouts that are separated by `;`.

    Raises:
        L0MoEError: a word is not known, stands twice, or needs a number.
    """
    layouts = [parse_layout(part) for part in text.split(";") if part.strip()]
    if not layouts:
        raise L0MoEError("No layout was given; write layouts as 'tp2,sp;ep2;pp2'.")
    return layouts


def parse_layout(text: str) -> Layout:
    """Read one layout, `tp2,sp,ep2`; the number of processes follows from it."""
    values: dict[str, object] = {}
    for word in (part.strip() for part in text.split(",")):
        field, value = _word(word, text)
        if field in values:
            raise L0MoEError(
                f"The layout {text.strip()!r} says {field} twice, in {word!r}; remove one of the two."
            )
        values[field] = value
    values.pop(ONE, None)
    data = values.pop("data", None)
    layout = Layout(**values)  # type: ignore[arg-type]
    processes = smallest_world(layout) if data is None else layout.dense_product * int(str(data))
    return dataclasses.replace(layout, processes=processes)


def _word(word: str, text: str) -> tuple[str, object]:
    if word == ONE:
        return ONE, True
    if word in SWITCHES:
        return SWITCHES[word], True
    if word in DISPATCHERS:
        return "dispatcher", word
    if word == BATCHED:
        return "overlap_p2p", False
    if found := re.fullmatch(r"layers(\d+(?:\+\d+)+)", word):
        return "pipeline_layers", tuple(int(number) for number in found[1].split("+"))
    name, number = re.fullmatch(r"(.*?)(\d*)", word).groups()  # type: ignore[union-attr]
    if name in SIZES and number and int(number) > 0:
        return SIZES[name], int(number)
    known = [*(f"{name}2" for name in SIZES), *SWITCHES, *DISPATCHERS, BATCHED, "layers1+3", ONE]
    raise L0MoEError(
        f"The layout {text.strip()!r} has the word {word!r}{nearest(word, known)}; known words are "
        f"{', '.join(known)}, with other numbers above 0."
    )


class ParallelSection(RecipePart):
    """Parallel layout of one training job; the products must fit the processes that are started."""

    processes: Processes = 1
    """Processes (GPUs) in all."""
    nodes: Processes = 1
    tensor: Processes = 1
    sequence: bool = True
    """Sequence parallelism where tensor is above 1; an MoE needs it."""
    pipeline: Processes = 1
    virtual_pipeline: int = Field(default=1, ge=1, le=MOST_CHUNKS)
    """Model chunks of each pipeline rank, which shorten the pipeline's idle time."""
    pipeline_layers: list[Annotated[int, Field(ge=0, le=MOST)]] | None = Field(
        default=None, min_length=2, max_length=MOST_CHUNKS
    )
    """Layers of each of the pipeline * virtual_pipeline stages; None: the same number in all."""
    overlap_p2p: bool = True
    """Send the messages of a virtual pipeline while computing, not in batches."""
    expert: Processes = 1
    expert_tensor: Processes | None = None
    """Processes that share one expert; None: as many as tensor."""
    context: Processes = 1
    """Processes that share one sequence; needs GPUs with Transformer Engine."""
    distributed_optimizer: bool = False
    """Spread the optimizer's state over the data-parallel processes."""
    dispatcher: Literal["alltoall", "allgather"] | None = None
    """How tokens travel to their experts; None: what the machine takes."""
    threads: Count = 1
    """OMP threads of each process."""

    @property
    def layout(self) -> Layout:
        """The layout without what belongs to the machine, its nodes and threads."""
        values: dict[str, Any] = {
            field.name: getattr(self, field.name, field.default) for field in dataclasses.fields(Layout)
        }
        values["sequence"] = self.sequence and self.tensor > 1
        values["pipeline_layers"] = tuple(self.pipeline_layers or ())
        return Layout(**values)


FREE_FLAGS = ("recompute-", "save-retain-interval")
"""Beginnings of Megatron's flags that change memory, time or disk and not the result: no part of a stage's settings."""
RECOMPUTATION = "recompute-"


def _check_recomputation(flags: Flags) -> Flags:
    for name in flags:
        if not name.startswith(RECOMPUTATION):
            raise ValueError(
                f"flag {name!r} is none of recomputation, and no other may change with the number of GPUs; write it "
                "into the training section"
            )
    return flags


class JobLayout(RecipePart):
    """What a training job takes on so many GPUs."""

    parallel: ParallelSection
    flags: Annotated[Flags, AfterValidator(_check_recomputation)] = Field(default_factory=dict)
    """Flags of recomputation, `recompute-...`, on top of the section's flags."""

    def section_keys(self) -> dict[str, Any]:
        """Return the keys that it sets in the training section, without `flags`."""
        return self.model_dump(exclude={"flags"})


class ExpertJobLayout(JobLayout):
    """The same for the expert stage."""

    at_once: int = Field(default=1, ge=1, le=MOST_EXPERTS)


class LayoutBlock(RecipePart):
    """The layouts of both stages on so many GPUs, as `l0moe plan RECIPE --gpus N` prints them."""

    expert_training: ExpertJobLayout
    moe_training: JobLayout


def with_block(raw: dict[str, Any], gpus: int, block: LayoutBlock) -> dict[str, Any]:
    """Return a recipe's keys with those of the block for so many GPUs in its training sections.

    Raises:
        ValueError: the block takes more GPUs, or a section has such a key itself.
    """
    merged = dict(raw)
    for name, job in (("expert_training", block.expert_training), ("moe_training", block.moe_training)):
        if job.parallel.processes > gpus:
            raise ValueError(
                f"layouts.{gpus}.{name}.parallel.processes ({job.parallel.processes}) must be at most {gpus}, the "
                "number of GPUs"
            )
        section = raw.get(name, {})
        flags = section.get("flags", {})
        twice = [f"{name}.{key}" for key in job.section_keys() if key in section]
        twice += [f"{name}.flags.{key}" for key in flags if key.startswith(RECOMPUTATION)]
        if twice:
            raise ValueError(
                f"{twice[0]} may not stand beside layouts, which say it for each number of GPUs; remove it"
            )
        merged[name] = section | job.section_keys() | {"flags": flags | job.flags}
    return merged


DISTRIBUTED_TIMEOUT_MINUTES = 60


def layout_flags(layout: Layout) -> dict[str, Flag]:
    """Return the flags of a layout, by name without the leading dashes; True stands for a flag without a value."""
    flags: dict[str, Flag] = {
        FLAGS["tensor"]: layout.tensor,
        FLAGS["pipeline"]: layout.pipeline,
        "distributed-timeout-minutes": DISTRIBUTED_TIMEOUT_MINUTES,
    }
    for field in ("sequence", "expert", "expert_tensor", "dispatcher", "context", "distributed_optimizer"):
        value = getattr(layout, field)
        if value != getattr(ONE_PROCESS, field):
            flags[FLAGS[field]] = value
    if layout.distributed_optimizer:
        flags["dist-ckpt-optim-fully-reshardable"] = True
    return flags | _pipeline(layout)


def _pipeline(layout: Layout) -> dict[str, Flag]:
    flags: dict[str, Flag] = {}
    if layout.pipeline_layers:
        stages = ["t" * layers for layers in layout.pipeline_layers]
        flags[FLAGS["pipeline_layers"]] = f"E{'|'.join(stages)}L"  # embedding, layers by stage, loss
    elif layout.virtual_pipeline > 1:
        flags[FLAGS["virtual_pipeline"]] = layout.virtual_pipeline
    if layout.virtual_pipeline > 1 and not layout.overlap_p2p:
        flags[FLAGS["overlap_p2p"]] = True
    return flags

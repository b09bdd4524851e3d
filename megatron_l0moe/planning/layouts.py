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
"""

import dataclasses
import math
import re
from dataclasses import dataclass

from megatron_l0moe.errors import L0MoEError, nearest

SIZES = {
    "tp": "tensor",
    "pp": "pipeline",
    "vp": "virtual_pipeline",
    "ep": "expert",
    "etp": "expert_tensor",
    "cp": "context",
    "dp": "data",
}
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

"""The matrix of parallel layouts that must give the numbers of one process, and the faults that must show.

Read by the test and by the program that torchrun starts; imports no torch.
"""

from dataclasses import dataclass, field

TOLERANCE = 1e-6  # absolute, float32: sums are taken in another order; gradients here are of size 1e-3 to 1


@dataclass(frozen=True)
class Case:
    """A model and a stage; each has one reference, made by one process."""

    name: str
    stage: str
    title: str
    iterations: tuple[int, ...]
    """Consecutive forward and backward passes, without an update of the weights between them."""
    control: str = "lagrangian"
    tied: bool = False
    qkv_bias: bool = False


# expert and mom: of 20 steps one with open gates, one with sampled gates, one with the hard mask. moe: the balance loss
# of a step sees the load of the step before.
CASES = (
    Case("lagrangian", "expert", "expert, lagrangian", (2, 9, 19)),
    Case(
        "budget", "expert", "expert, budget, tied, QKV bias", (2, 9, 19), "budget", tied=True, qkv_bias=True
    ),
    Case("moe", "moe", "moe", (0, 1)),
    Case("moe_tied", "moe", "moe, tied, QKV bias", (0, 1), tied=True, qkv_bias=True),
    Case("dsmoe", "dsmoe", "dsmoe", (0,)),
    Case("mom", "mom", "mom", (2, 9, 19)),
)
CASE = {case.name: case for case in CASES}
ALL = ("expert", "moe", "dsmoe", "mom")


@dataclass(frozen=True)
class Layout:
    """One way to spread the model and the batch over processes; what is left of the processes is data parallelism."""

    name: str
    processes: int
    tensor: int = 1
    sequence: bool = True
    """Sequence parallelism with tensor parallelism; an MoE cannot do without."""
    pipeline: int = 1
    virtual: int | None = None
    first_stage_layers: int | None = None
    expert: int = 1
    expert_tensor: int | None = None
    dispatcher: str = "allgather"
    distributed_optimizer: bool = False
    recompute: str | None = None
    micro_batch: int = 1
    stages: tuple[str, ...] = ALL
    """Stages in which this layout means something: only the moe stage has experts to spread."""


@dataclass(frozen=True)
class Fault:
    """Something broken on purpose, in a layout where it must show."""

    name: str
    """Of the function in `layout_faults.py`."""
    text: str
    layout: Layout
    case: str


MOE = ("moe",)
REFERENCE = Layout("1 process", 1)
SWAPPED_MESSAGES = "PP2 x VPP2"
LAYOUTS = (
    Layout("1 process, micro-batch of 2", 1, micro_batch=2),
    Layout("1 process, full recompute", 1, recompute="full"),
    Layout("1 process, selective recompute", 1, recompute="selective"),
    Layout("DP2", 2),
    Layout("DP2, micro-batch of 2", 2, micro_batch=2),
    Layout("DP2 + distributed optimizer", 2, distributed_optimizer=True),
    Layout("TP2", 2, tensor=2, sequence=False, stages=("expert", "dsmoe", "mom")),
    Layout("TP2 + SP", 2, tensor=2),
    Layout("TP2 + SP, full recompute", 2, tensor=2, recompute="full"),
    Layout("TP2 + SP, selective recompute", 2, tensor=2, recompute="selective"),
    Layout("PP2", 2, pipeline=2),
    Layout("PP2, full recompute", 2, pipeline=2, recompute="full"),
    Layout("PP2, 3 + 1 layers", 2, pipeline=2, first_stage_layers=3),
    Layout("PP2, 1 + 3 layers: the first stage is dense", 2, pipeline=2, first_stage_layers=1),
    Layout(SWAPPED_MESSAGES, 2, pipeline=2, virtual=2),
    Layout("EP2, allgather", 2, expert=2, stages=MOE),
    Layout("EP2, alltoall", 2, expert=2, dispatcher="alltoall", stages=MOE),
    Layout(
        "EP2, alltoall + distributed optimizer", 2, expert=2, dispatcher="alltoall", distributed_optimizer=True,
        stages=MOE,
    ),
    Layout("DP4", 4),
    Layout("TP2 + SP x DP2 + distributed optimizer", 4, tensor=2, distributed_optimizer=True),
    Layout("TP2 + SP x PP2", 4, tensor=2, pipeline=2),
    Layout("PP2 x DP2", 4, pipeline=2),
    Layout("EP4, allgather", 4, expert=4, stages=MOE),
    Layout("EP4, alltoall", 4, expert=4, dispatcher="alltoall", stages=MOE),
    Layout("TP2 + SP x EP2, expert-TP 1, allgather", 4, tensor=2, expert=2, expert_tensor=1, stages=MOE),
    Layout(
        "TP2 + SP x EP2, expert-TP 1, alltoall", 4, tensor=2, expert=2, expert_tensor=1, dispatcher="alltoall",
        stages=MOE,
    ),
    Layout("TP2 + SP x EP2, expert-TP 2, allgather", 4, tensor=2, expert=2, expert_tensor=2, stages=MOE),
    Layout(
        "TP2 + SP x EP2, expert-TP 2, alltoall", 4, tensor=2, expert=2, expert_tensor=2, dispatcher="alltoall",
        stages=MOE,
    ),
    Layout("PP2 x EP2", 4, pipeline=2, expert=2, stages=MOE),
    Layout("PP2 x VPP2 x EP2, alltoall", 4, pipeline=2, virtual=2, expert=2, dispatcher="alltoall", stages=MOE),
)  # fmt: skip
LAYOUT = {layout.name: layout for layout in LAYOUTS}

FAULTS = (
    Fault("noise_by_rank", "gate noise keyed by the rank", LAYOUT["DP2"], "lagrangian"),
    Fault("noise_by_rank", "gate noise keyed by the rank", LAYOUT["TP2 + SP"], "budget"),
    Fault(
        "penalty_for_each_micro_batch", "penalty of eq. 2 not divided by the micro-batches", LAYOUT["DP2"], "lagrangian"
    ),
    Fault("no_expert_scale", "experts' gradients without DDP's factor edp / dp", LAYOUT["EP2, alltoall"], "moe"),
    Fault("no_tensor_scale", "router losses not divided by the TP size", LAYOUT["TP2 + SP"], "moe"),
    Fault("no_sequence_sum", "no all-reduce of norm and router gradients under SP", LAYOUT["TP2 + SP"], "moe"),
    Fault("local_load", "load of the experts counted on each DP rank alone", LAYOUT["DP2"], "moe"),
    Fault("penalty_for_each_micro_batch", "sparsity loss not divided by the micro-batches", LAYOUT["DP2"], "dsmoe"),
    Fault("no_tensor_sum", "gradients of the blocks' factors not summed over TP ranks", LAYOUT["TP2"], "dsmoe"),
    Fault("no_loss_share", "sparsity loss not divided by the TP size", LAYOUT["TP2 + SP"], "dsmoe"),
    Fault("no_sequence_sum", "no all-reduce of norm and gate gradients under SP", LAYOUT["TP2 + SP"], "dsmoe"),
    Fault("blocks_of_the_first_rank", "every TP rank takes the first rank's blocks", LAYOUT["TP2 + SP"], "dsmoe"),
    Fault("noise_by_rank", "gate noise keyed by the rank", LAYOUT["DP2"], "mom"),
    Fault("penalty_for_each_micro_batch", "penalty and balance not divided by the micro-batches", LAYOUT["DP2"], "mom"),
    Fault("local_load", "choices of masks counted on each DP rank alone", LAYOUT["DP2"], "mom"),
    Fault("no_tensor_sum", "gradients of the masks' weights not summed over TP ranks", LAYOUT["TP2"], "mom"),
    Fault("no_sequence_sum", "no all-reduce of norm and router gradients under SP", LAYOUT["TP2 + SP"], "mom"),
    Fault("masks_of_the_first_rank", "every TP rank takes the first rank's noise", LAYOUT["TP2 + SP"], "mom"),
    Fault("no_loss_share", "balance loss not divided by the TP size", LAYOUT["TP2 + SP"], "mom"),
    Fault("batched_messages", "VPP with batched messages between stages", LAYOUT[SWAPPED_MESSAGES], "moe"),
    Fault("batched_messages", "VPP with batched messages between stages", LAYOUT[SWAPPED_MESSAGES], "lagrangian"),
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One entry of the matrix, and what came out."""

    layout: str
    case: str
    fault: str = ""
    loss: float = 0.0
    """Largest difference of a step's loss from one process."""
    gradient: float = 0.0
    """Largest difference of a gradient or of a buffer, over all steps, tensors and replicas."""
    where: str = ""
    tensors: int = 0
    seconds: float = 0.0
    problems: tuple[str, ...] = field(default=())
    """Tensors that are missing, additional, or not covered by the ranks."""

    @property
    def difference(self) -> float:
        """The larger of both."""
        return max(self.loss, self.gradient)


def runs_of(processes: int) -> list[tuple[Layout, list[tuple[Case, str]]]]:
    """Return, for each layout of a number of processes, the cases with the faults to try ('' for none)."""
    chosen = [layout for layout in LAYOUTS if layout.processes == processes]
    return [
        (
            layout,
            [(case, "") for case in CASES if case.stage in layout.stages]
            + [(CASE[fault.case], fault.name) for fault in FAULTS if fault.layout == layout],
        )
        for layout in chosen
    ]

"""The torchrun command that trains a dense model on a sample index. Pure text: nothing is started or read here.

Not a stage of the chain: it makes base models where none is at hand, and the dense models that an L0-MoE is compared
with. All parameters train, in the stock model through our layer spec.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_l0moe.launch import jobs
from megatron_l0moe.recipe.layout import Flag, Layout, layout_flags
from megatron_l0moe.sizes.architecture import Architecture


@dataclass(frozen=True, kw_only=True)
class DenseTraining:
    """What a dense training run is made of."""

    folder: Path
    """Takes checkpoints/ and metrics.jsonl."""
    index: Path
    """Prefix of a sample index of any kind."""
    start: Path | None
    """Megatron checkpoint of a dense model, as `convert` writes it; None: random weights."""
    steps: int
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    """Sequences of one step."""
    learning_rate: float
    warmup_share: float
    """First part of the steps in which the learning rate rises."""
    seed: int
    """Of the random weights."""
    save_interval: int
    layout: Layout = field(default_factory=Layout)
    threads: int = 1
    flags: Mapping[str, Flag] = field(default_factory=dict)
    """Further flags, which win."""


def dense_job(
    training: DenseTraining, architecture: Architecture, *, python: str = sys.executable
) -> jobs.Job:
    """Return the job; started again, it goes on from its last checkpoint."""
    own = str(training.folder / "checkpoints")
    flags = (
        jobs.size_flags(architecture, training.seq_length)
        | jobs.batch_flags(
            training.micro_batch_size, training.global_batch_size, training.steps, training.seed
        )
        | jobs.schedule_flags(training.learning_rate, training.steps, training.warmup_share)
        | jobs.optimizer_flags()
        | {"ckpt-format": "torch_dist", "save": own, "load": own, "save-interval": training.save_interval}
        | ({"pretrained-checkpoint": str(training.start)} if training.start else {})
        | layout_flags(training.layout)
        | {
            "l0-stage": "dense",
            "l0-data-index": str(training.index),
            "l0-metrics-file": str(training.folder / "metrics.jsonl"),
        }
        | dict(training.flags)
    )
    launcher = jobs.launcher(python, training.layout.processes, nodes=1)
    words = [*launcher, "-m", jobs.PRETRAIN, *architecture.megatron_flags(), *jobs.render(flags)]
    return jobs.Job(command=words, env=jobs.environment(training.threads))

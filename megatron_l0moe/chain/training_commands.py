"""The exact torchrun commands of the training jobs, as lists of words. Pure text: nothing is started or read here.

One function for each group of flags; a job is the sum of its groups. Flags that depend on the platform (gloo,
local kernels) are added by the job itself, so the command is the same on a laptop and on a GPU node.

Beside the jobs of the chain there is one that trains a dense model on a sample index: it makes base models where none
is at hand, and the dense models that an L0-MoE is compared with. All its parameters train, in the stock model through
our layer spec.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.methods.method import method_of, section_flags
from megatron_l0moe.recipe.layout import FLAGS, Flag, Flags, Layout, layout_flags
from megatron_l0moe.recipe.recipe import Recipe, Section
from megatron_l0moe.recipe.sections import ExpertTrainingSection, MoETrainingSection
from megatron_l0moe.runs.stages import Run
from megatron_l0moe.runs.training_end import STOP_FILE
from megatron_l0moe.sizes.architecture import Architecture

OWNED_BY_THE_CHAIN = frozenset(
    {
        *("load", "save", "pretrained-checkpoint", "train-iters", "seq-length", "global-batch-size", "seed"),
        *("l0-stage", "l0-dense-layers", "l0-expert-ffn", "l0-data-index", "l0-metrics-file", "l0-stop-file"),
        "l0-train-weights",  # expert_training.train_weights
        *section_flags(),
        *("num-experts", "moe-layer-freq", "moe-ffn-hidden-size", "moe-router-topk"),
        *(FLAGS[field] for field in FLAGS if field not in ("distributed_optimizer", "dispatcher")),
        # other ways to say what a layout says
        "num-layers-per-virtual-pipeline-stage",
        *("decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers"),
        *("tokenizer-type", "vocab-size", "ckpt-format", "micro-batch-size", "train-samples", "finetune"),
        # the exported layouts know softmax after top-k only
        *("moe-router-pre-softmax", "moe-router-score-function", "moe-router-topk-scaling-factor"),
        # end a job before its last step, with exit code 0
        *("exit-interval", "exit-duration-in-mins", "exit-signal-handler"),
    }
)
"""Flags that follow from the rest of the recipe or from the run folder, so `flags:` may not set them."""
NOT_IN_A_TRIAL = frozenset(
    {
        *("bf16", "fp16", "fp8-format", "fp8-recipe"),  # their rounding would hide what a trial looks for
        *("lr-warmup-iters", "lr-decay-iters", "lr-wsd-decay-iters"),  # count the steps of the whole stage
        *("use-distributed-optimizer", "dist-ckpt-optim-fully-reshardable", "overlap-param-gather"),
        "moe-token-dispatcher-type",
        *("tensorboard-dir", "wandb-project", "wandb-exp-name"),
    }
)
"""Flags of a recipe that a trial leaves out: precision, the stage's length, what a layout decides, what is written."""


BALANCE_COEFFICIENT = 0.01
"""alpha of eq. 7."""
Z_COEFFICIENT = 0.003
"""alpha * lambda of eq. 7 and eq. 3: 0.01 * 0.3."""


def stage_flags(recipe: Recipe, stage: str | None = None) -> Flags:
    """Return the stage, `stage` or what the stage `moe` of the recipe's chain is to the program, and its shape."""
    flags: Flags = {
        "l0-stage": stage or ("moe" if recipe.method == "l0moe" else recipe.method),
        "l0-dense-layers": recipe.model.dense_layers,
    }
    if recipe.method == "l0moe":
        flags["l0-expert-ffn"] = recipe.model.expert_ffn
    return flags


def expert_flags(recipe: Recipe, architecture: Architecture) -> Flags:
    """Return the flags of Megatron's MoE layers; none for a method without them."""
    if recipe.method != "l0moe":
        return {}
    dense = recipe.model.dense_layers
    return {
        "num-experts": recipe.model.num_experts,
        "moe-ffn-hidden-size": recipe.model.expert_ffn,
        "moe-router-topk": recipe.model.top_k,
        "moe-layer-freq": f"([0]*{dense}+[1]*{architecture.num_layers - dense})",
        "moe-router-dtype": "fp32",
        "moe-router-load-balancing-type": "none",  # eq. 3 is attached by our router
        "moe-aux-loss-coeff": BALANCE_COEFFICIENT,
        "moe-z-loss-coeff": Z_COEFFICIENT,
    }


PRETRAIN = "megatron_l0moe.training.pretrain"
LOGITS = "megatron_l0moe.training.logits"
DECAY_SHARE = 0.10
"""Last share of the steps in which the learning rate falls to 0 along a cosine (WSD schedule)."""
EXPERT_WARMUP_SHARE = 0.20
MOE_WARMUP_SHARE = 0.06
EXACT_FP32 = {"NVIDIA_TF32_OVERRIDE": "0"}
"""Set where fp32 numbers are compared: Transformer Engine multiplies fp32 matrices in TF32, which has 10 bits."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A few fp32 steps of a stage in some layout on one machine, from the stage's initial weights; it saves nothing.

    The whole schedule (warm-up, gates, decay) is shrunk to these steps.
    """

    layout: Layout
    steps: int
    folder: Path
    """Takes metrics.jsonl."""
    flags: Mapping[str, Flag] = field(default_factory=dict)
    """Further flags, which win."""


@dataclass(frozen=True, kw_only=True)
class _Extent:
    """What differs between a stage's own job and a trial of it."""

    folder: Path
    steps: int
    layout: Layout
    save_interval: int | None
    """None: no checkpoint is saved, nor read from the stage's folder."""


@dataclass(frozen=True, kw_only=True)
class TrainingCommand:
    """A command and the variables that it needs on top of the environment."""

    command: list[str]
    env: dict[str, str]

    @property
    def program(self) -> list[str]:
        """The words after torchrun's own: `-m`, the module and its flags."""
        return self.command[self.command.index(PRETRAIN) - 1 :]


def expert_job(
    run: Run, architecture: Architecture, k: int, *, python: str = sys.executable, trial: Trial | None = None
) -> TrainingCommand:
    """Return the job that trains the masks and the MLPs of expert k (paper section 3.2), or a trial of it."""
    recipe, training = run.recipe, run.recipe.expert_training
    extent = _extent(training, run.expert_folder(k), recipe.expert_steps, trial)
    flags = (
        size_flags(architecture, recipe.data.seq_length)
        | batch_flags(training.micro_batch_size, training.global_batch_size, extent.steps, recipe.seed)
        | schedule_flags(training.learning_rate, extent.steps, EXPERT_WARMUP_SHARE)
        | optimizer_flags()
        | _checkpoints(extent, run.stage_folder("convert") / "megatron")
        | layout_flags(extent.layout)
        | stage_flags(recipe, "expert")
        | _files(run.stage_folder("curate") / f"expert_{k:03d}", extent.folder)
        | {"l0-mask-lr": training.mask_learning_rate, "l0-noise-seed": recipe.seed}
        | {"l0-train-weights": "on" if training.train_weights else "off"}
    )
    return _job(
        python, training, architecture, flags, "expert_training", trial, recipe, name=f"expert_{k:03d}"
    )


def moe_job(
    run: Run, architecture: Architecture, *, python: str = sys.executable, trial: Trial | None = None
) -> TrainingCommand:
    """Return the job that trains experts and routers together (paper section 3.3), or a trial of it.

    Of a method beside L0-MoE: the job that trains the dense model with that method's layers.
    """
    recipe, training = run.recipe, run.recipe.moe_training
    start = "assemble" if recipe.method == "l0moe" else "convert"
    extent = _extent(training, run.stage_folder("moe"), recipe.moe_steps, trial)
    flags = (
        size_flags(architecture, recipe.data.seq_length)
        | batch_flags(training.micro_batch_size, recipe.moe_global_batch_size, extent.steps, recipe.seed)
        | schedule_flags(training.learning_rate, extent.steps, MOE_WARMUP_SHARE)
        | optimizer_flags()
        | _checkpoints(extent, run.stage_folder(start) / "megatron")
        | layout_flags(extent.layout)
        | expert_flags(recipe, architecture)
        | stage_flags(recipe)
        | _files(run.stage_folder("curate") / "moe", extent.folder)
        | {"l0-router-lr": training.router_learning_rate or training.learning_rate}
        | method_of(recipe.method).flags(recipe)
    )
    return _job(python, training, architecture, flags, "moe_training", trial, recipe)


def logits_job(run: Run, architecture: Architecture, *, python: str = sys.executable) -> TrainingCommand:
    """Return the job that writes the trained Megatron model's logits, for the parity check of `evaluate`.

    It runs in one process whatever the training layout was: a torch_dist checkpoint loads in any layout. It runs on the
    CPU, as the exported model does that it is compared with: 23 billion float32 weights do not fit into a GPU of 80 GB.
    """
    recipe = run.recipe
    flags = (
        size_flags(architecture, recipe.data.seq_length)
        | {
            "micro-batch-size": 1,
            "load": str(run.stage_folder("moe") / "checkpoints"),
            "ckpt-format": "torch_dist",
        }
        | expert_flags(recipe, architecture)
        | stage_flags(recipe)
        | method_of(recipe.method).flags(recipe)
        | {
            "l0-heldout": str(run.stage_folder("curate") / "heldout.jsonl"),
            "l0-positions": recipe.evaluation.parity_positions,
            "l0-logits-file": str(logits_file(run)),
        }
    )
    threads = recipe.moe_training.parallel.threads
    words = [python, "-m", LOGITS, *architecture.megatron_flags(), *render(flags)]
    return TrainingCommand(command=words, env=environment(threads) | {"CUDA_VISIBLE_DEVICES": ""})


def logits_file(run: Run) -> Path:
    """Return the file that the logits job writes: `tokens` [N], `logits` [N, V], `margins` [N]."""
    return run.stage_folder("evaluate") / "megatron_logits.safetensors"


def render(flags: Mapping[str, Flag]) -> list[str]:
    """Return flags as words of a command line."""
    words: list[str] = []
    for name, value in flags.items():
        words.append(f"--{name}")
        if value is not True:
            words.append(str(value))
    return words


def size_flags(architecture: Architecture, seq_length: int) -> Flags:
    """Return the flags of vocabulary and sequence."""
    # The data is tokenised already; NullTokenizer only tells Megatron the number of ids.
    return {
        "tokenizer-type": "NullTokenizer",
        "vocab-size": architecture.vocab_size,
        # No padding: the number of rows, and with it the loss, must not depend on tensor parallelism.
        "make-vocab-size-divisible-by": 1,
        "seq-length": seq_length,
    }


def batch_flags(micro: int, batch: int, steps: int, seed: int) -> Flags:
    """Return the flags of a job's length and batches; nothing is evaluated."""
    return {
        "micro-batch-size": micro,
        "global-batch-size": batch,
        "train-iters": steps,
        "seed": seed,
        "eval-iters": 0,
        "eval-interval": steps,  # Megatron divides by it even when nothing is evaluated
        "num-workers": 0,  # a sample is a read of mapped memory
        "log-interval": 1,
        # A NaN ends the job at once; the default does the step again, saves, and ends to be tried on another GPU.
        "rerun-mode": "disabled",
    }


def schedule_flags(learning_rate: float, steps: int, warmup_share: float) -> Flags:
    """Return the learning rate's: warm-up, constant, then a cosine to 0 over the last tenth."""
    return {
        "lr": learning_rate,
        "min-lr": 0.0,
        "lr-decay-style": "WSD",
        "lr-wsd-decay-style": "cosine",
        "lr-wsd-decay-iters": share_of_steps(DECAY_SHARE, steps),
        "lr-warmup-iters": min(share_of_steps(warmup_share, steps), steps - 1),
    }


def share_of_steps(share: float, steps: int) -> int:
    """Return a share of the steps as a whole number, at least 1."""
    return max(1, round(share * steps))


def optimizer_flags() -> Flags:
    """Return Adam's settings, the same in all stages."""
    return {"weight-decay": 0.1, "adam-beta1": 0.9, "adam-beta2": 0.95, "clip-grad": 1.0}


def _extent(
    training: ExpertTrainingSection | MoETrainingSection, folder: Path, steps: int, trial: Trial | None
) -> _Extent:
    if trial:
        return _Extent(folder=trial.folder, steps=trial.steps, layout=trial.layout, save_interval=None)
    return _Extent(
        folder=folder, steps=steps, layout=training.parallel.layout, save_interval=training.save_interval
    )


def _checkpoints(extent: _Extent, start: Path) -> Flags:
    """Go on from our own checkpoint when there is one, else start from the stage before."""
    if extent.save_interval is None:
        return {"ckpt-format": "torch_dist", "pretrained-checkpoint": str(start)}
    own = str(extent.folder / "checkpoints")
    return {
        "ckpt-format": "torch_dist",
        "save": own,
        "load": own,
        "pretrained-checkpoint": str(start),
        "save-interval": extent.save_interval,
    }


def _files(index: Path, folder: Path) -> Flags:
    return {
        "l0-data-index": str(index),
        "l0-metrics-file": str(folder / "metrics.jsonl"),
        "l0-stop-file": str(folder / STOP_FILE),
    }


def _job(
    python: str,
    training: ExpertTrainingSection | MoETrainingSection,
    architecture: Architecture,
    flags: Flags,
    section: Section,
    trial: Trial | None,
    recipe: Recipe,
    name: str = "",
) -> TrainingCommand:
    """Sum up a job; `name` tells it from the others that share its section of the recipe."""
    fixed = architecture.megatron_flags()
    for flag in training.flags:
        if flag in OWNED_BY_THE_CHAIN or f"--{flag}" in fixed:
            raise L0MoEError(
                f"{section}.flags may not set {flag!r}, which follows from the model and the rest of the recipe; "
                "remove it."
            )
    parallel = training.parallel
    extra = recipe.dtype_flags(section) | _told_apart(training.flags, name)
    processes, nodes = parallel.processes, parallel.nodes
    if trial:
        extra = {flag: value for flag, value in extra.items() if flag not in NOT_IN_A_TRIAL} | dict(
            trial.flags
        )
        processes, nodes = trial.layout.processes, 1
    words = [*launcher(python, processes, nodes), "-m", PRETRAIN, *fixed, *render(flags | extra)]
    return TrainingCommand(command=words, env=environment(parallel.threads) | (EXACT_FP32 if trial else {}))


def _told_apart(flags: Mapping[str, Flag], name: str) -> Flags:
    """Give each job that shares these flags a TensorBoard folder and a W&B name of its own."""
    own = dict(flags)
    for flag, separator in (("tensorboard-dir", "/"), ("wandb-exp-name", "-")):
        if name and flag in own:
            own[flag] = f"{own[flag]}{separator}{name}"
    return own


def launcher(python: str, processes: int, nodes: int) -> Sequence[str]:
    """Return the words that start the processes of a job."""
    per_node = ("--nproc-per-node", str(processes // nodes))
    if nodes == 1:
        return (python, "-m", "torch.distributed.run", "--standalone", *per_node)
    # Of one node; the batch job's shell fills these in, see sbatch.py.
    static = ("--node-rank", "$SLURM_NODEID", "--master-addr", "$head", "--master-port", "$port")
    return (python, "-m", "torch.distributed.run", "--nnodes", str(nodes), *per_node, *static)


def environment(threads: int) -> dict[str, str]:
    """Return the variables that a job needs."""
    # Megatron wants one hardware queue on a GPU when it overlaps tensor-parallel work; it does nothing elsewhere.
    return {"OMP_NUM_THREADS": str(threads), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


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
    """The seed of the random weights."""
    save_interval: int
    layout: Layout = field(default_factory=Layout)
    threads: int = 1
    flags: Mapping[str, Flag] = field(default_factory=dict)
    """Further flags, which win."""


def dense_job(
    training: DenseTraining, architecture: Architecture, *, python: str = sys.executable
) -> TrainingCommand:
    """Return the job; started again, it goes on from its last checkpoint."""
    own = str(training.folder / "checkpoints")
    flags = (
        size_flags(architecture, training.seq_length)
        | batch_flags(training.micro_batch_size, training.global_batch_size, training.steps, training.seed)
        | schedule_flags(training.learning_rate, training.steps, training.warmup_share)
        | optimizer_flags()
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
    before = launcher(python, training.layout.processes, nodes=1)
    words = [*before, "-m", PRETRAIN, *architecture.megatron_flags(), *render(flags)]
    return TrainingCommand(command=words, env=environment(training.threads))


PROGRAM = "megatron_l0moe.training.construct"


def construct_job(
    run: Run, architecture: Architecture, k: int, *, python: str = sys.executable
) -> TrainingCommand:
    """Return the job that makes expert k from a calibration pass.

    The learning rates, batch sizes and flags of `expert_training` are those of training and have no part in it.
    """
    recipe, training = run.recipe, run.recipe.expert_training
    flags: Flags = size_flags(architecture, recipe.data.seq_length) | {
        "micro-batch-size": 1,
        "seed": recipe.seed,
        "ckpt-format": "torch_dist",
        "pretrained-checkpoint": str(run.stage_folder("convert") / "megatron"),
        **layout_flags(dataclasses.replace(training.parallel.layout, distributed_optimizer=False)),
        "l0-stage": "expert",
        "l0-dense-layers": recipe.model.dense_layers,
        "l0-expert-ffn": recipe.model.expert_ffn,
        "l0-data-index": str(run.stage_folder("curate") / f"expert_{k:03d}"),
        "l0-method": training.method,
        "l0-calibration-sequences": recipe.calibration_sequences,
        "l0-damping": training.calibration.damping,
        "l0-shared": training.calibration.shared,
        "l0-expert": k,
        "l0-experts": recipe.model.num_experts,
        "l0-top-k": recipe.model.top_k,
        "l0-expert-file": str(run.expert_folder(k) / "expert.safetensors"),
    }
    parallel = training.parallel
    words = [*launcher(python, parallel.processes, parallel.nodes), "-m", PROGRAM]
    words += [*architecture.megatron_flags(), *render(flags)]
    return TrainingCommand(command=words, env=environment(parallel.threads) | EXACT_FP32)

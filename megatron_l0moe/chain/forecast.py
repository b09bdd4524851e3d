"""How long each stage of a run will take on a CPU, before anything was run: FLOPs by formula over the measured speed.

A stage is a list of parts in the order in which it does them; each bears the name that the stage's own messages begin
with, so that `progress.py` can see which part is under way. The shares and rates below were fitted to runs of the
quickstart on two kinds of machine and are good to a factor of two, which is all that is claimed.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_l0moe.chain.machine import Machine
from megatron_l0moe.plan.plan import stage_models
from megatron_l0moe.recipe.recipe import Recipe, Section
from megatron_l0moe.runs.stages import STAGE_NAMES
from megatron_l0moe.sizes.architecture import Architecture
from megatron_l0moe.sizes.flops import Recompute, StageModel, dense_model, forward_flops, training_flops

MATRIX_SHARE = 0.6
"""The share of the measured speed of matrix products that a forward or backward pass reaches."""
ENCODER_SHARE = 0.3
"""The share that the sentence encoder reaches, whose matrices are smaller."""
COMMAND_SECONDS = 10.0
"""Start and end of a stage's process: imports above all."""
JOB_SECONDS = 25.0
"""Start and end of a training job: torchrun, imports, loading and saving."""
BYTES_PER_SECOND = 5e7
"""The rate at which weights are read, converted, hashed and written."""
MEMORY_BYTES_PER_SECOND = 6e9
"""Weights that one core reads while it decodes."""
DECODE_LAYER_SECONDS = 4e-4
"""The time of one decode step in transformers that goes to other things than matrix products, for each layer."""
TOKENS_PER_DOCUMENT = 180
"""An assumption about the documents that curate embeds, until it has counted them."""
TOKENISED_PER_SECOND = 1e5
WARM_UP_PAIRS, DECODE_BATCH, DECODE_PROMPT = 1, 8, 32
"""Sizes of the speed test, see evaluation/timing.py."""

Parts = dict[str, float]
"""Seconds of each part of a stage, in order."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Seconds by stage and part, and of one training token by stage."""

    stages: dict[str, Parts]
    per_token: dict[str, float]
    """Seconds of one token of one job of `experts` and of `moe`."""

    def seconds(self, name: str) -> float:
        """Seconds of a whole stage."""
        return sum(self.stages[name].values())


def forecast(recipe: Recipe, architecture: Architecture, machine: Machine) -> Forecast | None:
    """Return what the stages of a recipe will take; None on GPUs and for methods whose FLOPs are not counted.

    Args:
        recipe: with its dtype settled.
        machine: a CPU with its measured speed.
    """
    if machine.kind == "gpu" or recipe.method != "l0moe":
        return None
    work = _Work(recipe, architecture, machine)
    per_token = {
        "experts": work.experts.model / work.speed("expert_training"),
        "moe": work.moe.model / work.speed("moe_training"),
    }
    stages: dict[str, Parts] = {name: globals()[f"_{name}"](work) for name in STAGE_NAMES}
    return Forecast(stages=stages, per_token=per_token)


class _Work:
    """Sizes of a run, and how fast this machine does which part of it."""

    def __init__(self, recipe: Recipe, architecture: Architecture, machine: Machine) -> None:
        self.recipe, self.machine = recipe, machine
        self.layers = architecture.num_layers
        self.dense = dense_model(architecture)
        expert_model, self.moe_model = stage_models(recipe, architecture)
        length = recipe.data.seq_length
        self.experts = training_flops(expert_model, length, Recompute())
        self.moe = training_flops(self.moe_model, length, Recompute())

    def speed(self, section: Section) -> float:
        """FLOP/s that one job of a training section gets; jobs side by side share the cores."""
        parallel = self.recipe.parallel(section)
        jobs = self.recipe.expert_training.at_once if section == "expert_training" else 1
        threads = parallel.processes * parallel.threads
        share = min(threads, self.machine.cores / jobs) / self.machine.cores
        dtype = "bfloat16" if self.recipe.trains_in_bf16(section) else "float32"
        return MATRIX_SHARE * share * self.machine.flops[dtype]

    def forward(self, model: StageModel, tokens: int) -> float:
        """Seconds of a forward pass on all cores in the dtype of the evaluation."""
        flops = forward_flops(model, self.recipe.data.seq_length) * tokens
        return flops / (MATRIX_SHARE * self.machine.flops[self.recipe.evaluation.settled_dtype])

    def copied(self, model: StageModel, passes: int = 2) -> float:
        """Seconds of reading and writing a model's weights, at four bytes each."""
        return passes * model.counts.total * 4 / BYTES_PER_SECOND

    @property
    def heldout_tokens(self) -> int:
        """Tokens of the held-out text, with one source domain a cluster where nothing is known."""
        return self.recipe.data.heldout_tokens_per_domain * self.recipe.model.num_experts


def _convert(work: _Work) -> Parts:
    return {"start": COMMAND_SECONDS, "weights": work.copied(work.dense)}


def _curate(work: _Work) -> Parts:
    data = work.recipe.data
    tokens = data.tokens_per_expert * work.recipe.model.num_experts
    tokens += data.tokens_per_set * (data.iterations - 1) + work.heldout_tokens
    documents = tokens / TOKENS_PER_DOCUMENT
    flops = documents * data.embedding_max_tokens * _encoder_flops(data.embedding_model)
    return {
        "start": COMMAND_SECONDS + JOB_SECONDS,
        "embedded documents": flops / (ENCODER_SHARE * work.machine.flops["float32"]),
        "tokenised documents": tokens / TOKENISED_PER_SECOND,
    }


def _experts(work: _Work) -> Parts:
    recipe = work.recipe
    rounds = -(-recipe.model.num_experts // recipe.expert_training.at_once)
    start = rounds * (COMMAND_SECONDS + JOB_SECONDS)
    if recipe.construction is not None:
        tokens = rounds * recipe.calibration_sequences * recipe.data.seq_length
        flops = forward_flops(work.dense, recipe.data.seq_length) * tokens
        return {"start": start, "calibration": 2 * flops / work.speed("expert_training")}
    tokens = recipe.expert_steps * recipe.data.seq_length * recipe.expert_training.global_batch_size
    return {"start": start, "steps": rounds * tokens * work.experts.model / work.speed("expert_training")}


def _assemble(work: _Work) -> Parts:
    return {"start": COMMAND_SECONDS, "merged": work.copied(work.moe_model)}


def _moe(work: _Work) -> Parts:
    recipe = work.recipe
    tokens = recipe.moe_steps * recipe.data.seq_length * recipe.moe_global_batch_size
    steps = tokens * work.moe.model / work.speed("moe_training")
    return {"start": COMMAND_SECONDS + JOB_SECONDS, "steps": steps}


def _export(work: _Work) -> Parts:
    return {"start": COMMAND_SECONDS, "rules": work.copied(work.moe_model)}


def _evaluate(work: _Work) -> Parts:
    tokens = work.heldout_tokens
    return {
        "start": COMMAND_SECONDS + JOB_SECONDS + work.copied(work.moe_model, 3),
        "perplexity of l0moe_untrained": work.forward(work.moe_model, tokens),
        "perplexity of dense": work.forward(work.dense, tokens),
        "perplexity of l0moe": work.forward(work.moe_model, tokens),
        **_speed_test(work),
    }


def _speed_test(work: _Work) -> Parts:
    """Return the parts of the speed test, which runs both models on one core."""
    evaluation, cores = work.recipe.evaluation, work.machine.cores
    pairs = evaluation.repeats + WARM_UP_PAIRS
    prefill = cores * (
        work.forward(work.dense, evaluation.prefill_tokens)
        + work.forward(work.moe_model, evaluation.prefill_tokens)
    )
    parts = {"speed: prefill": pairs * prefill}
    for name, batch in (("speed: decode_b1", 1), ("speed: decode_b8", DECODE_BATCH)):
        step = sum(_decode_step(work, model, batch) for model in (work.dense, work.moe_model))
        prompts = prefill * batch * DECODE_PROMPT / evaluation.prefill_tokens
        parts[name] = pairs * (evaluation.decode_tokens * step + prompts)
    return parts


def _decode_step(work: _Work, model: StageModel, batch: int) -> float:
    read = 4 * model.counts.read(batch) / MEMORY_BYTES_PER_SECOND
    computed = work.machine.cores * work.forward(model, batch)
    return max(read, computed) + work.layers * DECODE_LAYER_SECONDS


def _report(work: _Work) -> Parts:
    return {"start": COMMAND_SECONDS}


def _encoder_flops(folder: str) -> float:
    """Return the FLOPs of one token in a BERT-like encoder, from its config.json; of a small one if there is none."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "intermediate_size": 1536}
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        hidden, layers, wide = (int(config.get(name, default)) for name, default in sizes.items())
    except (OSError, ValueError, TypeError, AttributeError):
        hidden, layers, wide = sizes.values()
    return 2.0 * layers * (4 * hidden * hidden + 2 * hidden * wide)

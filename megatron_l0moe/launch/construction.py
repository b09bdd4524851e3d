"""The job of an expert that is made without training, where `expert_training.method` is not l0. Pure text."""

import dataclasses
import sys

from megatron_l0moe.launch.jobs import EXACT_FP32, Job, environment, launcher, render, size_flags
from megatron_l0moe.launch.stages import Run
from megatron_l0moe.recipe.layout import Flags, layout_flags
from megatron_l0moe.sizes.architecture import Architecture

PROGRAM = "megatron_l0moe.training.construct"


def construct_job(run: Run, architecture: Architecture, k: int, *, python: str = sys.executable) -> Job:
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
    return Job(command=words, env=environment(parallel.threads) | EXACT_FP32)

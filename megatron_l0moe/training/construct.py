"""Make one expert without training: a calibration pass through the dense model, then a method that chooses units.

`torchrun ... -m megatron_l0moe.training.construct [Megatron's flags] --l0-stage expert --l0-method M ...` writes
the expert file and, after it, `construction.json` with the numbers of the manifest beside it. Tensor, pipeline and
data parallelism work as in training, a virtual pipeline does not. The model is computed in float32.
"""

import argparse
import functools
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_l0moe.checkpoints.torch_dist import CheckpointReader
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.experts.construction import (
    ConstructionSettings,
    LayerExpert,
    construct_layer,
    write_constructed,
)
from megatron_l0moe.runs.stage_folder import write_json
from megatron_l0moe.runtime import checkpoint_fixes, cpu
from megatron_l0moe.training.pretrain import exit_with_one_sentence

logger = logging.getLogger(__name__)

NUMBERS_FILE = "construction.json"
CHUNK = 64
"""Sequences between two lines of progress."""


@dataclass(frozen=True, kw_only=True)
class ConstructConfig:
    """What this command makes, and from how much text."""

    l0_method: str = "random"
    """How units are chosen, see docs/experts.md."""
    l0_calibration_sequences: int = 1
    """Sequences that pass through the dense model."""
    l0_damping: float = 0.01
    """Added to the diagonal of sums of a a^T, as a fraction of its mean."""
    l0_shared: float = 0.5
    """Share of an expert's units that all experts have, for coactivation."""
    l0_expert: int = 0
    """Number of the expert, from 0."""
    l0_experts: int = 2
    """Experts in all; for coactivation their sample indexes lie beside --l0-data-index."""
    l0_top_k: int = 2
    """Experts that will serve one token."""
    l0_expert_file: str = ""
    """The safetensors file to write."""


def main() -> None:
    """Run the calibration pass, construct the layers, write the expert."""
    cpu.install_training()
    checkpoint_fixes.install()
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training as megatron_training
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.models.gpt import GPTModelBuilder

    from megatron_l0moe.training import arguments, calibration_pass, checkpoints, model

    args, config, settings = arguments.parse_beside_training(ConstructConfig, "L0 construction")
    _check(args)
    method = _settings(config, args)
    reader = CheckpointReader(Path(args.pretrained_checkpoint))
    checkpoints.check_model(reader, args, settings, "dense")
    megatron_training.initialize_megatron()
    started = time.monotonic()
    builder = GPTModelBuilder(model.model_config(args, settings))
    gpt = builder.build_model(ProcessGroupCollection.use_mpu_process_groups())
    checkpoints.check_keys([gpt], args)
    # the gates are not in the dense checkpoint; everything else was just found there
    args.load, args.dist_ckpt_strictness = args.pretrained_checkpoint, "log_unexpected"
    load_checkpoint([gpt], None, None)
    gpt = gpt.to(cpu.device()).eval()
    sequences = calibration_pass.sequences(args, method, config.l0_calibration_sequences)
    collector = calibration_pass.Collector(gpt, method)
    loss = calibration_pass.run_pass(gpt, settings, sequences, chunk=CHUNK)
    dense = functools.partial(_fc2, reader)
    made = _construct(collector.calibrations(), method, dense, solves=calibration_pass.is_first_of_stage())
    tensors = _gather(made)
    if torch.distributed.get_rank() == 0:
        numbers = write_constructed(Path(config.l0_expert_file), tensors, reader, method=method.method)
        numbers |= {
            "calibration_tokens": len(sequences) * args.seq_length,
            "calibration_loss": loss,
            "seconds": round(time.monotonic() - started, 3),
        }
        write_json(Path(config.l0_expert_file).with_name(NUMBERS_FILE), numbers)
    torch.distributed.barrier()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def _check(args: argparse.Namespace) -> None:
    if args.virtual_pipeline_model_parallel_size is not None:
        raise L0MoEError(
            "A virtual pipeline only shortens the idle time of training; remove virtual_pipeline (and its "
            "pipeline_layers) to construct experts."
        )
    if args.l0_stage != "expert" or not args.pretrained_checkpoint or not args.l0_expert_file:
        raise L0MoEError(
            "Constructing an expert needs --l0-stage expert, --pretrained-checkpoint and --l0-expert-file; let "
            "`l0moe experts` start the job."
        )


def _settings(config: ConstructConfig, args: argparse.Namespace) -> ConstructionSettings:
    return ConstructionSettings(
        method=config.l0_method,
        width=args.l0_expert_ffn,
        expert=config.l0_expert,
        num_experts=config.l0_experts,
        top_k=config.l0_top_k,
        damping=config.l0_damping,
        shared=config.l0_shared,
        seed=args.seed,
    )


def _fc2(reader: CheckpointReader, layer: int) -> torch.Tensor:
    return reader.read(f"decoder.layers.{layer}.mlp.linear_fc2.weight")


def _construct(
    calibrations: Iterator[tuple[int, Any]], method: ConstructionSettings, fc2: Any, *, solves: bool
) -> dict[int, LayerExpert]:
    """Construct this pipeline stage's layers on its first rank.

    Raises:
        L0MoEError: on all ranks, with the sentence of the first rank that met a problem.
    """
    made: dict[int, LayerExpert] = {}
    refusal = ""
    try:
        for layer, calibration in calibrations:  # a collective operation: all ranks go through all layers
            if not solves or refusal:
                continue
            try:
                made[layer] = construct_layer(method, layer, calibration, fc2(layer).to(cpu.device()))
                logger.info("constructed layer %d by %s: %s", layer, method.method, made[layer].numbers)
            except L0MoEError as error:
                refusal = str(error)
    except L0MoEError as error:
        refusal = str(error)
    refusals: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(refusals, refusal)
    if found := next(filter(None, refusals), ""):
        raise L0MoEError(found)
    return made


def _gather(made: dict[int, LayerExpert]) -> dict[int, LayerExpert]:
    """Bring the layers of all pipeline stages to rank 0; the others get what they have."""
    on_cpu = {
        layer: LayerExpert(
            units=expert.units.cpu(),
            down=None if expert.down is None else expert.down.cpu(),
            input_mean=expert.input_mean.cpu(),
            numbers=expert.numbers,
        )
        for layer, expert in made.items()
    }
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    parts: list[dict[int, LayerExpert]] | None = [{}] * world if rank == 0 else None
    torch.distributed.gather_object(on_cpu, parts, dst=0)
    return {layer: expert for part in parts or [on_cpu] for layer, expert in sorted(part.items())}


if __name__ == "__main__":
    exit_with_one_sentence(main)

"""Where a job starts from: its own last good checkpoint, or the stage's initial weights; both are checked first."""

import argparse
import logging
import re
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.training.checkpointing import checkpoint_exists

from megatron_l0moe.checkpoints.torch_dist import CheckpointReader, tracked
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runtime.checkpoint_metadata import read_metadata
from megatron_l0moe.training import checkpoint_check
from megatron_l0moe.training.arguments import Settings

logger = logging.getLogger(__name__)

Start = Literal["own", "initial", "nothing"]
# State that a stage adds to the weights it starts from; Megatron's empty `_extra_state` objects carry nothing.
ADDED_STATE = re.compile(r"\.mlp\.(gate|block_gate|masks|mask_router)\.|\.router\.expert_load\.|_extra_state")


def check(models: list[Any], args: argparse.Namespace, settings: Settings) -> list[Any]:
    """Find and check the checkpoint that Megatron loads next, and say how strictly it matches keys.

    A hook that Megatron calls with the model chunks, when process groups exist and nothing is loaded. Rank 0 looks at
    the files and tells the others, so that all ranks start from the same checkpoint or stop with the same sentence. A
    job's own checkpoint must hold every key. The initial weights hold all but the state that the stage adds (gates;
    counters of the routers), so there Megatron is told to log what the checkpoint lacks, and `check_keys` refuses
    everything else.

    Raises:
        L0MoEError: the checkpoint is damaged, of another job, or lacks a tensor of the model.
    """
    start = _on_rank_0(args, settings)
    if start == "own":
        args.dist_ckpt_strictness = "raise_unexpected"
    elif start == "initial":
        args.dist_ckpt_strictness = "log_unexpected"
        check_keys(models, args)
    return models


def choose(args: argparse.Namespace, settings: Settings) -> Start:
    """Look at the files, repair the tracker file of the job's own folder, and return where the job starts.

    Raises:
        L0MoEError: see `check`.
    """
    folder = Path(args.load) if args.load else None
    if folder is not None and args.ckpt_step:
        reader = checkpoint_check.open_checkpoint(folder / f"iter_{args.ckpt_step:07d}")
        checkpoint_check.check_own(reader, args, settings)
        return "own"
    found = checkpoint_check.last_good(folder) if folder is not None else None
    if folder is not None and found is not None:
        if args.finetune:
            checkpoint_check.check_model(found.reader, args, settings, settings.plan.stage)
        else:
            checkpoint_check.check_own(found.reader, args, settings)
        checkpoint_check.take_up(folder, found)
        return "own"
    if not args.pretrained_checkpoint:
        return "nothing"
    stage = checkpoint_check.STAGE_BEFORE[settings.plan.stage]
    initial = Path(args.pretrained_checkpoint)
    if not checkpoint_exists(args.pretrained_checkpoint):
        raise L0MoEError(
            f"--pretrained-checkpoint {initial} holds no Megatron checkpoint; "
            f"run the stage before '{settings.plan.stage}' first."
        )
    checkpoint_check.check_model(CheckpointReader(initial), args, settings, stage)
    logger.info("starting from the initial weights in %s", initial)
    return "initial"


def check_keys(models: list[Any], args: argparse.Namespace) -> None:
    """Refuse initial weights that lack a tensor of the model, which would then train from random values.

    Raises:
        L0MoEError: names the first tensor that is missing.
    """
    folder = Path(args.pretrained_checkpoint)
    found = read_metadata(tracked(folder) or folder).state_dict_metadata
    lost = sorted(key for model in models for key in model_keys(model) if key not in found)
    if lost:
        raise L0MoEError(
            f"--pretrained-checkpoint {args.pretrained_checkpoint} lacks {lost[0]} ({len(lost)} tensors in all); "
            "it is of another model or another stage, so run the stage before again."
        )


def model_keys(model: Any) -> set[str]:
    """Return the checkpoint keys of a model, without the state that our stages add."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    keys = {entry.key for entry in model.sharded_state_dict(metadata=metadata).values()}
    return {key for key in keys if not ADDED_STATE.search(key)}


def _on_rank_0(args: argparse.Namespace, settings: Settings) -> Start:
    answer: list[tuple[Start, str]] = [("nothing", "")]
    if torch.distributed.get_rank() == 0:
        try:
            answer = [(choose(args, settings), "")]
        except L0MoEError as error:
            answer = [("nothing", str(error))]
    torch.distributed.broadcast_object_list(answer, src=0)
    start, refusal = answer[0]
    if refusal:
        raise L0MoEError(refusal)
    return start

"""Where a job starts from: its own last checkpoint, or the stage's initial weights, whose keys are checked."""

import argparse
import logging
import re
from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from megatron.training.checkpointing import checkpoint_exists, get_checkpoint_tracker_filename, read_metadata
from torch.distributed.checkpoint import FileSystemReader

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.training.arguments import Settings

logger = logging.getLogger(__name__)

# State that a stage adds to the weights it starts from; Megatron's empty `_extra_state` objects carry nothing.
ADDED_STATE = re.compile(r"\.mlp\.gate\.|\.router\.expert_load\.|_extra_state")


def prepare(args: argparse.Namespace, settings: Settings) -> None:
    """Choose how strictly Megatron matches checkpoint keys.

    A job's own checkpoint must hold every key. The initial weights hold all but the state that the stage adds
    (gates; counters of the routers), so there Megatron is told to log what the checkpoint lacks, and `check_keys`
    refuses everything else.

    Raises:
        L0MoEError: neither a checkpoint of its own nor initial weights exist.
    """
    if args.load and checkpoint_exists(args.load):
        args.dist_ckpt_strictness = "raise_unexpected"
        return
    if not args.pretrained_checkpoint:
        return
    if not checkpoint_exists(args.pretrained_checkpoint):
        raise L0MoEError(
            f"--pretrained-checkpoint {args.pretrained_checkpoint} holds no Megatron checkpoint; "
            f"run the stage before '{settings.plan.stage}' first."
        )
    args.dist_ckpt_strictness = "log_unexpected"
    logger.info("starting from the initial weights in %s", Path(args.pretrained_checkpoint))


def check_keys(models: list[Any], args: argparse.Namespace) -> list[Any]:
    """Refuse initial weights that lack a tensor of the model, which would then train from random values.

    A hook that Megatron calls with the model chunks before it wraps them.
    """
    if args.pretrained_checkpoint and not (args.load and checkpoint_exists(args.load)):
        found = _stored_keys(Path(args.pretrained_checkpoint))
        lost = sorted(key for model in models for key in model_keys(model) if key not in found)
        if lost:
            raise L0MoEError(
                f"--pretrained-checkpoint {args.pretrained_checkpoint} lacks {lost[0]} ({len(lost)} tensors in all); "
                "it is of another model or another stage, so run the stage before again."
            )
    return models


def model_keys(model: Any) -> set[str]:
    """Return the checkpoint keys of a model, without the state that our stages add."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    keys = {entry.key for entry in model.sharded_state_dict(metadata=metadata).values()}
    return {key for key in keys if not ADDED_STATE.search(key)}


def _stored_keys(folder: Path) -> set[str]:
    iteration, release = read_metadata(get_checkpoint_tracker_filename(str(folder)))
    name = "release" if release else f"iter_{iteration:07d}"
    return set(FileSystemReader(folder / name).read_metadata().state_dict_metadata)

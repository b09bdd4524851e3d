"""Where a job starts from: its own last checkpoint, or the stage's initial weights; with the keys checked first."""

import argparse
import logging
from pathlib import Path

from megatron.training.checkpointing import checkpoint_exists

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.training.arguments import Settings

logger = logging.getLogger(__name__)


def prepare(args: argparse.Namespace, settings: Settings) -> None:
    """Choose how strictly Megatron matches checkpoint keys.

    A job's own checkpoint must hold every key. The initial weights hold all but the state that the stage adds
    (gates; counters of the routers), so there Megatron is told to log what the checkpoint lacks.

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

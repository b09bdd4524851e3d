"""A step with a folder: work, manifest, marker, in this order; what is done is not done again."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_l0moe.data.manifest import Restart, Stage, begin, finish, is_done

logger = logging.getLogger(__name__)


def do(stage: Stage, restart: Restart, work: Callable[[Path], dict[str, object]]) -> None:
    """Do a step if it is not done yet.

    Raises:
        L0MoEError: it was done with other settings, or its inputs were made anew since.
    """
    if is_done(stage):
        logger.info("%s: done", stage.name)
        return
    begin(stage, restart)
    logger.info("%s ...", stage.name)
    finish(stage, sys.argv, work(stage.folder))

"""A step with a folder: work, manifest, marker, in this order; what is done is not done again.

Several processes may work on one folder of results: a file's lock is held while something is made, and dropped by the
kernel when its process ends.
"""

import contextlib
import fcntl
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_l0moe.runs.stage_folder import Restart, StageFolder, begin, finish, is_done

logger = logging.getLogger(__name__)


def do(stage: StageFolder, restart: Restart, work: Callable[[Path], dict[str, object]]) -> None:
    """Do a step if it is not done yet.

    Raises:
        L0MoEError: it was done with other settings, or its inputs were made anew since.
    """
    with alone(stage.folder):
        if is_done(stage):
            logger.info("%s: done", stage.name)
            return
        begin(stage, restart)
        logger.info("%s ...", stage.name)
        finish(stage, sys.argv, work(stage.folder))


@contextlib.contextmanager
def alone(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a folder that is made; yields whether we have it, which is sure when we wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True

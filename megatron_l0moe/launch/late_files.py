"""Files that another node wrote a moment ago: a shared file system may show them late."""

import logging
import os
import time
from pathlib import Path

from megatron_l0moe.data.manifest import MANIFEST, MARKER, Stage

logger = logging.getLogger(__name__)

LATE_SECONDS = 90.0
"""NFS remembers for up to 60 s that a file was not there (acdirmax, nfs(5))."""
INTERVAL_SECONDS = 1.0


def wait_for_inputs(stage: Stage) -> None:
    """Wait, for a bounded time, until the markers of the input stages can be seen; whoever needs them says the rest."""
    deadline = time.monotonic() + LATE_SECONDS
    told = False
    while missing := [folder for folder in stage.inputs if not _is_there(folder)]:
        if time.monotonic() > deadline:
            return
        if not told:
            logger.info("Waiting up to %.0f s for %s to be finished.", LATE_SECONDS, missing[0])
            told = True
        time.sleep(INTERVAL_SECONDS)
        for folder in missing:
            if folder.is_dir():
                os.listdir(folder)  # makes a client of NFS ask again


def _is_there(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (MARKER, MANIFEST))

"""What tests that start and end real processes share."""

import time
from collections.abc import Callable

import psutil

PATIENCE = 30.0  # seconds; process starts are slow on a loaded machine


def wait_until(condition: Callable[[], bool]) -> None:
    """Return once ``condition`` holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether the process still runs; one that ended and that nobody has reaped yet does not."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False

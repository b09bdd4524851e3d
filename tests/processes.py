"""What tests that start and end real processes share."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

TESTS = Path(__file__).parent
PATIENCE = 30.0  # seconds; process starts are slow on a loaded machine
LAUNCH_SECONDS = 900


def torchrun(
    processes: int, program: Path, *words: str | Path, log: Path, timeout: float = LAUNCH_SECONDS
) -> None:
    """Run a program of this checkout in gloo processes; it must end with 0.

    The output goes to a file, since a killed rank leaves helper processes that hold a pipe.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run(
            [*command, str(program), *map(str, words)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
            },
            check=False,
            timeout=timeout,
        )
    assert done.returncode == 0, log.read_text(encoding="utf-8")[-6000:]


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

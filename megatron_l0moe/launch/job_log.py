"""Why a Slurm job ended, out of its log, which holds all of its starts one after the other."""

import os
import re
from pathlib import Path

from megatron_l0moe.launch.run import TAIL_BYTES, meaningful_line

_START = re.compile(r"^\d\d:\d\d:\d\d \| \w+: job \S+ on .*, start \d+$", re.M)
_SCRIPT = re.compile(r"^\d\d:\d\d:\d\d \| (?:convert|curate|experts|assemble|moe|export|evaluate|report): ")
"""What the batch script itself says."""
_SRUN = re.compile(
    r"^srun: (?:error: \S+: tasks? .*|Job step .*|Terminating .*|First task exited .*|launch/slurm: .*)$"
)
"""That a task ended, not why."""
_USER_ERROR = re.compile(r"^srun: error: \S+: tasks? .*Exited with exit code 2$", re.M)


def reason(log: Path) -> str:
    """Return the line of a job's last start that says why it ended."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    last = text[max((found.end() for found in _START.finditer(text)), default=0) :]
    lines = [line for line in last.splitlines() if line.strip() and not _SRUN.match(line)]
    theirs = [line for line in lines if not _SCRIPT.match(line)]
    if _USER_ERROR.search(last) and theirs:
        return theirs[-1].strip()  # our own commands end with a sentence and exit code 2
    if theirs:
        return meaningful_line("\n".join(theirs), code=1)
    return _SCRIPT.sub("", lines[-1]) if lines else "its log is empty"

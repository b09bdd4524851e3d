"""Why a Slurm job ended, out of its log, which holds all of its starts one after the other."""

import os
import re
from pathlib import Path

from megatron_l0moe.launch.run import TAIL_BYTES, meaningful_line

_START = re.compile(r"^\d\d:\d\d:\d\d \| \w+: job \S+ on .*, start (\d+)$", re.M)
_SCRIPT = re.compile(r"^\d\d:\d\d:\d\d \| (?:convert|curate|experts|assemble|moe|export|evaluate|report): ")
"""What the batch script itself says."""
_SRUN = re.compile(
    r"^srun: (?:error: \S+: tasks? .*|Job step .*|Terminating .*|First task exited .*|launch/slurm: .*)$"
)
"""That a task ended, not why."""
_USER_ERROR = re.compile(r"^srun: error: \S+: tasks? .*Exited with exit code 2$", re.M)
_NODE_LOST = re.compile(r"slurmstepd\S*: error: \*\*\* JOB .* CANCELLED AT \S+ DUE TO NODE FAILURE")
"""What Slurm writes on a node that it ends a job on because it has lost another one."""


def reason(log: Path) -> str:
    """Return the line of a job's last start that says why it ended."""
    text = _tail(log)
    last = text[max((found.end() for found in _START.finditer(text)), default=0) :]
    lines = [line for line in last.splitlines() if line.strip() and not _SRUN.match(line)]
    theirs = [line for line in lines if not _SCRIPT.match(line)]
    if _USER_ERROR.search(last) and theirs:
        return theirs[-1].strip()  # our own commands end with a sentence and exit code 2
    if theirs:
        return meaningful_line("\n".join(theirs), code=1)
    return _SCRIPT.sub("", lines[-1]) if lines else "its log is empty"


def lost_a_node(log: Path, start: int) -> bool:
    """Whether Slurm says that it ended a start of a job, counted from 1, because it had lost a node of it."""
    if not log.is_file():
        return False
    text = _tail(log)
    begins = {int(found[1]): found.start() for found in _START.finditer(text)}
    if start not in begins and any(number < start for number in begins):
        return False  # not visible yet
    end = min((at for number, at in begins.items() if number > start), default=len(text))
    return _NODE_LOST.search(text, begins.get(start, 0), end) is not None


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        return file.read().decode("utf-8", errors="replace")

"""Why the processes of an attempt ended, out of their logs."""

import re
from pathlib import Path

from megatron_l0moe.launch.run import last_meaningful_line

SECONDARY = re.compile(
    r"DistBackendError|DistNetworkError|ConnectionError|NCCL|[Gg]loo|Connection (?:closed|reset|refused)|Broken pipe"
    r"|SignalException|TCPStore|ended by SIGTERM"
)
"""What a process says when another one has gone."""
ERROR = re.compile(r"\w*(?:Error|Exception|Interrupt|Exit): \S|^error: |^a worker was ", re.M)


def reason_in(logs: Path) -> str:
    """Return the line that says why an attempt ended.

    Args:
        logs: one log, or a folder with the logs of many processes. There the first process that failed by itself
            is meant: of those whose last line is an error, and not that of a lost connection, the one whose log
            ended first. A process that was killed says nothing, and the others say only that it is gone.
    """
    files = [logs] if logs.is_file() else list(logs.rglob("*.log"))
    files = sorted((file for file in files if file.stat().st_size), key=lambda file: file.stat().st_mtime_ns)
    if not files:
        return "nothing was written to its log"
    lines = [last_meaningful_line(file) for file in files]
    errors = [line for line in lines if ERROR.search(line)]
    first_hand = [line for line in errors if not SECONDARY.search(line)]
    if errors and not first_hand:
        return f"a process was killed, or a node or the network was lost ({errors[0].rstrip('.')})"
    return first_hand[0] if first_hand else lines[-1]

"""Run commands as child processes: their output to log files, no process left behind whatever happens.

A command can end in four ways, and none of them may leave a training process that writes on into a run folder:
it ends by itself; it fails; we are told to stop (Ctrl-C, SIGTERM, SIGHUP); or we are killed with SIGKILL. For
the last one the kernel tells the child (PR_SET_PDEATHSIG). Grandchildren that lost their parent are adopted by
us (PR_SET_CHILD_SUBREAPER) and ended too: torchrun starts its workers in sessions of their own.

Why a command ended is read from its logs; that of a Slurm job holds all of its starts, one after the other.
"""

import contextlib
import ctypes
import itertools
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

from megatron_l0moe.errors import DISK_FULL_TEXT, L0MoEError
from megatron_l0moe.runs.caller_environment import for_our_processes

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = 30.0
"""The time from SIGTERM to SIGKILL; torchrun itself gives its workers up to 30 s."""
TAIL_BYTES = 65536
USER_ERROR_EXIT = 2
"""Exit code of our own commands when the message is one sentence for the user."""

_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_ERROR_LINE = re.compile(r"^(?:\[rank\d+\]:\s*)?(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt|Exit)): \S")
_RANK = re.compile(r"^\[rank\d+\]:\s*")
_USAGE_ERROR = re.compile(r"^\S+: (error: \S.*)")  # argparse
_OUR_SENTENCE = re.compile(r"^Error: (\S.*)")
_LAUNCHER_NOISE = re.compile(
    r"torch[./]distributed[./](?:elastic|launcher|run)\b|ChildFailedError|SignalException|<NO_OTHER_FAILURES>"
    r"|^\S+ FAILED$|^Failures:$|^Root Cause|^\[\d+\]:$"
    r"|^(?:(?:time|host|rank|exitcode|traceback) +|error_file):"
)
_RULER = re.compile(r"^[-=\s]+$")
_LAUNCHER_TRACEBACK = re.compile(
    r"^Traceback \(most recent call last\):\n(?:[ \t].*\n)*\S*(?:ChildFailedError|SignalException)\b.*", re.M
)
_ROOT_SIGNAL = re.compile(r"^Root Cause.*?Signal \d+ \((SIG\w+)\) received by PID", re.M | re.S)


class CommandFailedError(L0MoEError):
    """A child process ended with an exit code other than 0."""

    def __init__(self, message: str, *, code: int, last_line: str, log: Path) -> None:
        """Keep what the caller needs to word its own sentence."""
        super().__init__(message)
        self.code = code
        self.last_line = last_line
        self.log = log


@dataclass(frozen=True, kw_only=True)
class Command:
    """Words to run, where the output is appended, and variables added to our own environment."""

    words: Sequence[str]
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)


def run_command(
    command: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    poll: Callable[[], None] | None = None,
    interval: float = 0.5,
    grace: float = GRACE_SECONDS,
    keep_open: Sequence[int] = (),
) -> None:
    """Run one command to its end; see `run_commands`."""
    run_commands(
        [Command(words=command, log=log, env=env or {})],
        poll=poll,
        interval=interval,
        grace=grace,
        keep_open=keep_open,
    )


def run_commands(
    commands: Sequence[Command],
    *,
    at_once: int = 1,
    share: Callable[[int], Mapping[str, str]] = lambda place: {},
    poll: Callable[[], None] | None = None,
    interval: float = 0.5,
    grace: float = GRACE_SECONDS,
    keep_open: Sequence[int] = (),
) -> None:
    """Run commands in their order, up to `at_once` at the same time; the first failure ends the others.

    Args:
        share: further variables of a command that runs in place 0 ... `at_once` - 1, such as the GPUs of that place.
        poll: called every `interval` seconds while a command runs.
        grace: seconds between SIGTERM and SIGKILL when commands have to be stopped.
        keep_open: file descriptors that the children inherit (the run's lock).

    Raises:
        CommandFailedError: an exit code was not 0; the message holds it, the log's last meaningful line and its path.
        KeyboardInterrupt: we were told to stop; the commands and all their children have ended by then.
    """
    waiting = deque(commands)
    running: list[_Child] = []
    with _stop_requests() as asked_to_stop, _adopting_orphans() as bystanders:
        try:
            while (waiting or running) and not asked_to_stop:
                while waiting and len(running) < at_once:
                    place = min(set(range(at_once)) - {child.place for child in running})
                    running.append(_start(waiting.popleft(), place, share(place), keep_open))
                if poll is not None:
                    poll()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    running[0].process.wait(interval)
                for child in [child for child in running if child.process.poll() is not None]:
                    child.raise_if_failed()
                    _signal_group(child.process.pid, signal.SIGKILL)  # what it left behind
                    running.remove(child)
            if poll is not None:
                poll()
        finally:
            _end_all([child.process for child in running], grace, bystanders)
        if asked_to_stop:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class _Child:
    command: Command
    place: int
    process: "subprocess.Popen[bytes]"
    start: int
    """Offset in the log where its output begins."""

    def raise_if_failed(self) -> None:
        code = self.process.returncode
        if code == 0:
            return
        log = self.command.log
        last = last_meaningful_line(log, self.start, code)
        raise CommandFailedError(
            f"The command {command_name(self.command.words)} {_how(code)}: {last.rstrip('.')}; its log is {log}.",
            code=code,
            last_line=last,
            log=log,
        )


def _start(command: Command, place: int, share: Mapping[str, str], keep_open: Sequence[int]) -> _Child:
    command.log.parent.mkdir(parents=True, exist_ok=True)
    logger.debug("running %s", command.words)
    with command.log.open("ab") as output:
        start = output.tell()
        output.write(f"$ {' '.join(command.words)}\n".encode())
        output.flush()
        parent = os.getpid()
        # This process has one thread here (progress is drawn in poll), so preexec_fn is safe.
        process = subprocess.Popen(
            list(command.words),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**for_our_processes(os.environ), **command.env, **share},
            process_group=0,
            pass_fds=tuple(keep_open),
            preexec_fn=lambda: die_with_parent(parent),
        )
    return _Child(command, place, process, start)


def die_with_parent(parent: int) -> None:
    """Ask the kernel to send this process SIGTERM when the process `parent` that started it dies."""
    if _LIBC is None:
        return
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the line above
        os.kill(os.getpid(), signal.SIGTERM)


def last_meaningful_line(log: Path, start: int = 0, code: int = 1) -> str:
    """Return the line that says why a command failed: its last exception or usage error, else its last line.

    What torchrun itself prints is left out, but for the signal that ended a worker. Of a command of ours that
    ended with a sentence for the user (`USER_ERROR_EXIT`), the last line `Error: ...` goes before all others.

    Args:
        start: offset in bytes where this command's output begins.
        code: its exit code.
    """
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(start, size - TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    return meaningful_line(text, code)


def meaningful_line(text: str, code: int) -> str:
    """Return the line of a command's output that says why it ended with this exit code."""
    signals = _ROOT_SIGNAL.findall(text)
    if signals[-1:] == ["SIGKILL"]:  # what the other workers say then is only that this one is gone
        return "a worker was killed (often: not enough memory)"
    lines = _without_launcher(text)
    if code == USER_ERROR_EXIT:
        for line in reversed(lines):
            if found := _OUR_SENTENCE.match(line):
                return found[1]
    # A library that could not save says so, and what fails after it says something else, often in the last line.
    for line in reversed(lines):
        if DISK_FULL_TEXT.search(line):
            return _RANK.sub("", line).removeprefix("Error: ")
    for line in reversed(lines):
        if found := _ERROR_LINE.match(line) or _USAGE_ERROR.match(line):
            return line[found.start(1) :].removeprefix("L0MoEError: ").removeprefix("Error: ")
    if signals:
        return f"a worker was ended by {signals[-1]}"
    return lines[-1] if lines else "it printed nothing"


def _without_launcher(text: str) -> list[str]:
    """Return the lines that say something: no rulers, no command lines, nothing that torchrun itself printed."""
    lines = [line.strip() for line in _LAUNCHER_TRACEBACK.sub("", text).splitlines() if line[:2] != "$ "]
    return [line for line in lines if line and not _RULER.match(line) and not _LAUNCHER_NOISE.search(line)]


def command_name(command: Sequence[str]) -> str:
    """Return the short name of a command: the last module it runs, or its program."""
    modules = [word for before, word in itertools.pairwise(command) if before == "-m"]
    return modules[-1] if modules else Path(command[0]).name


def _how(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed (often: not enough memory)"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collect the signals that mean "stop" while a child runs, instead of dying of them before it has ended."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    # A signal that is ignored (nohup, a background job) stays ignored.
    wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in wanted}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _adopting_orphans() -> Iterator[frozenset[int]]:
    """Become the parent of orphaned descendants; yields the children that were there before and are not ours to end."""
    bystanders = frozenset(process.pid for process in psutil.Process().children())
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield bystanders
    finally:
        if _LIBC is not None:
            _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 0)


def _end_all(children: "Sequence[subprocess.Popen[bytes]]", grace: float, bystanders: frozenset[int]) -> None:
    """End the children and everything that they and those before them started."""
    for child in children:
        if child.poll() is None:
            _signal_group(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(deadline - time.monotonic(), 0.0))
        # Also when the child has ended: what is left of its group.
        _signal_group(child.pid, signal.SIGKILL)
        child.wait()
    # And what left its group and lost its parent.
    deadline = time.monotonic() + GRACE_SECONDS
    while _LIBC is not None and time.monotonic() < deadline:
        adopted = [process for process in psutil.Process().children() if process.pid not in bystanders]
        if not adopted:
            return
        for process in adopted:
            _kill_tree(process)
        time.sleep(0.02)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _kill_tree(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
        for descendant in (*process.children(recursive=True), process):
            with contextlib.suppress(psutil.NoSuchProcess):
                descendant.kill()
        os.waitpid(process.pid, os.WNOHANG)


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

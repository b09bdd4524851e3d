"""The attempts at a training job on a cluster, `attempts.jsonl` in its folder, and when there must be no further one.

An attempt is opened by `--phase prepare` and closed by `--phase finish` or, when that never ran, by the next
attempt. Clean stops (time limit, preemption) never count against a job. Crashes do: see `judge`.
"""

import datetime
import itertools
import json
import logging
import os
import shutil
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs.slurm_commands import SlurmUnreachableError, queue_state
from megatron_l0moe.runs.stage_folder import write_text
from megatron_l0moe.runs.training_end import STOP_FILE, forget_stop, read_failure, stopped_at

logger = logging.getLogger(__name__)

ATTEMPTS = "attempts.jsonl"
SAME_STEP_CRASHES = 2
"""Crashes in one step in a row that stop a job. A second one could be chance; it costs a night to find out, and a
person can start the job again in a minute."""
FRUITLESS_ATTEMPTS = 3
"""Attempts in a row without a new checkpoint that stop a job, in whatever steps they ended: it only burns GPU-hours.
So many that vanished in one step stop it too: by now it is not chance, whoever saw it."""
VANISHED_ATTEMPTS = 10
"""Attempts without a new checkpoint that vanished, in whatever steps, and stop a job: nodes that die so often need a
person, and nothing else would ever end this."""
NOT_SAVED = "it was asked to stop, and ended before it had saved: ask earlier, or save more often"
NODE_LOST = "Slurm lost one of its nodes, or the network to it, and ended it on the others"
SQUEUE_SECONDS = 60.0
SQUEUE_INTERVAL = 2.0
ENDED_STATES = frozenset(
    {
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
        *("PREEMPTED", "REVOKED", "TIMEOUT"),
    }
)
How = Literal["finished", "stopped", "interrupted", "failed", "crashed", "vanished"]
"""finished: the last step is saved. stopped: saved and ended because it was asked to. interrupted: asked to, but ended
before that. failed: the job said itself why it must not go on. crashed: it ended with an error. vanished: nobody was
left to say anything, as when a node dies, or Slurm ended it because it had lost another of its nodes."""


@dataclass(kw_only=True)
class Attempt:
    """One record of attempts.jsonl; what follows `ended` is empty while the attempt runs."""

    number: int
    """Counted from 1."""
    started: str
    host: str
    job: str
    """SLURM_JOB_ID, or empty."""
    restarts: int
    """SLURM_RESTART_COUNT."""
    start_step: int
    """Step of the checkpoint that it goes on from."""
    logs: str
    """File, or folder of files, that its processes write to."""
    metrics_time: int
    """Modification time of metrics.jsonl in ns when it began: unchanged means that it finished no step."""
    ended: str = ""
    how: How | None = None
    last_step: int | None = None
    """Last finished step, saved or not."""
    saved_step: int | None = None
    """Step of the last checkpoint."""
    saving: bool = False
    """Whether a checkpoint was due after the last finished step and is not there."""
    reason: str = ""
    verdict: Literal["", "done", "again", "stop"] = ""

    @property
    def place(self) -> str | None:
        """Where it was when it crashed or vanished; None where it did neither."""
        if self.how not in ("crashed", "vanished") or self.last_step is None:
            return None
        return f"while saving after step {self.last_step}" if self.saving else f"in step {self.last_step + 1}"

    @property
    def is_fruitless(self) -> bool:
        """Whether its work is lost by its own fault. A node's death is not; nor a stop that came before any work."""
        worked = self.last_step is not None and self.last_step > self.start_step
        return self.how == "crashed" or (self.how == "interrupted" and worked)


def read(folder: Path) -> list[Attempt]:
    """Return the attempts at the job in this folder, oldest first."""
    file = folder / ATTEMPTS
    if not file.is_file():
        return []
    try:
        return [Attempt(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise L0MoEError(f"{file} is damaged ({error}); remove it, it is a record only.") from error


def write(folder: Path, attempts: list[Attempt]) -> None:
    """Write all attempts, atomically."""
    write_text(folder / ATTEMPTS, "".join(json.dumps(asdict(attempt)) + "\n" for attempt in attempts))


def open_attempt(folder: Path, logs: Path) -> Attempt:
    """Append a record for the attempt that begins now."""
    attempts = read(folder)
    attempt = Attempt(
        number=len(attempts) + 1,
        started=_now(),
        host=socket.gethostname(),
        job=_job(),
        restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0") or 0),
        start_step=saved_step(folder),
        logs=str(logs),
        metrics_time=_metrics_time(folder),
    )
    write(folder, [*attempts, attempt])
    return attempt


def close_last(
    folder: Path, steps: int, save_interval: int | None, reason: str | None, *, lost_a_node: bool = False
) -> list[Attempt]:
    """Complete the record of the last attempt, if it is open, from what lies in the folder; returns all attempts.

    A stop request and its answer are removed then.

    Args:
        steps: of the whole job.
        save_interval: steps from one checkpoint to the next; None where training goes on while one is written.
        reason: last meaningful line of the log where an error ended it; None when nobody saw it end.
        lost_a_node: whether Slurm says that it ended the job for this; the stop request is then its, and came too late.
    """
    attempts = read(folder)
    if not attempts or attempts[-1].how is not None:
        return attempts
    last = attempts[-1]
    last.ended, last.saved_step = _now(), saved_step(folder)
    last.last_step = _last_step(folder, last)
    last.saving = save_interval is not None and _is_saving(last, steps, save_interval)
    failure, stopped = read_failure(folder), stopped_at(folder)
    if last.saved_step == steps:
        last.how = "finished"
    elif failure is not None:
        last.how, last.reason = "failed", failure.sentence
    elif stopped is not None:
        last.how, last.last_step = "stopped", stopped
    elif lost_a_node:
        last.how, last.reason = "vanished", NODE_LOST
    elif (folder / STOP_FILE).exists():
        last.how, last.reason = "interrupted", NOT_SAVED
    elif reason is None:
        last.how = "vanished"
    else:
        last.how, last.reason = "crashed", reason
    write(folder, attempts)
    # Here, and not when the next attempt begins: a request that comes in its first seconds is not stale.
    forget_stop(folder)
    return attempts


def judge(attempts: list[Attempt]) -> str | None:
    """Say why there must be no further attempt; None: there may be one.

    Only attempts of this Slurm job count, and none up to its last verdict `stop`: in between, a person has decided
    to go on. Attempts that vanished, as when their node dies, were seen by nobody: they stop a job only beside a
    crash in the same place, or when there are more of them than chance explains.
    """
    recent = list(itertools.takewhile(_counts, reversed(attempts)))
    if not recent:
        return None
    place = recent[0].place
    there = list(itertools.takewhile(lambda attempt: place is not None and attempt.place == place, recent))
    ways = {attempt.how for attempt in there}
    if len(there) >= (SAME_STEP_CRASHES if "crashed" in ways else FRUITLESS_ATTEMPTS):
        way = "ended" if len(ways) > 1 else there[0].how
        return f"{way} {place} in {len(there)} attempts in a row"
    since = list(itertools.takewhile(lambda attempt: (attempt.saved_step or 0) <= attempt.start_step, recent))
    fruitless = sum(attempt.is_fruitless for attempt in since)
    vanished = sum(attempt.how == "vanished" for attempt in since)
    if fruitless >= FRUITLESS_ATTEMPTS:
        return f"ended in {fruitless} attempts in a row without a new checkpoint"
    if vanished >= VANISHED_ATTEMPTS:
        return f"vanished in {vanished} attempts in a row without a new checkpoint"
    return None


def _counts(attempt: Attempt) -> bool:
    ended_badly = attempt.how in ("crashed", "vanished", "interrupted")
    return ended_badly and attempt.job == _job() and attempt.verdict != "stop"


def check_owner(folder: Path) -> None:
    """Refuse to work in a folder that belongs to another Slurm job, running or queued.

    The lock of a run cannot say this: it is held while a command runs, and a job on a cluster is three commands.
    """
    attempts = read(folder)
    if not attempts or attempts[-1].verdict in ("done", "stop"):
        return
    job = attempts[-1].job
    if job in ("", _job()):
        return
    state = _state(job)
    if state and state.rstrip("+") not in ENDED_STATES:
        raise L0MoEError(
            f"The Slurm job {job} ({state.lower()}) works on {folder}; wait until it ends, or end it with "
            f"`scancel {job}`."
        )


def seconds(attempt: Attempt) -> float:
    """Return how long an attempt lasted, or 0 while it runs."""
    if not attempt.ended:
        return 0.0
    begun, ended = (datetime.datetime.fromisoformat(text) for text in (attempt.started, attempt.ended))
    return (ended - begun).total_seconds()


def saved_step(folder: Path) -> int:
    """Return the step of the last checkpoint, 0 where there is none."""
    file = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    text = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
    return int(text) if text.isascii() and text.isdigit() else 0


def _job() -> str:
    """Return the id of the Slurm job that this process belongs to; a requeued job keeps it."""
    return os.environ.get("SLURM_JOB_ID", "")


def _last_step(folder: Path, attempt: Attempt) -> int:
    """Return the last step that an attempt finished; an attempt that finished none left metrics.jsonl as it was."""
    if _metrics_time(folder) == attempt.metrics_time:
        return attempt.start_step
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        try:
            return int(json.loads(line)["iteration"])
        except (ValueError, KeyError, TypeError):
            continue  # cut short when the process was killed
    return attempt.start_step


def _is_saving(attempt: Attempt, steps: int, save_interval: int) -> bool:
    """Whether an attempt ended between its last step, which is noted first, and the checkpoint after it."""
    done, saved = attempt.last_step or 0, attempt.saved_step or 0
    return saved < done and done > attempt.start_step and (done % save_interval == 0 or done == steps)


def _metrics_time(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.stat().st_mtime_ns if file.is_file() else 0


def _state(job: str) -> str:
    """Return what Slurm says of a job, empty where it knows nothing of it (any more)."""
    if shutil.which("squeue") is None:
        logger.warning("There is no squeue here, so nothing says whether the Slurm job %s still runs.", job)
        return ""
    deadline = time.monotonic() + SQUEUE_SECONDS
    # a controller that is started anew answers after some seconds, and a job that completes is gone
    while True:
        try:
            state = queue_state(job)
            if state != "COMPLETING" or time.monotonic() > deadline:
                return state
        except SlurmUnreachableError as error:
            if time.monotonic() > deadline:
                raise L0MoEError(
                    f"squeue does not say whether the Slurm job {job}, which worked here last, still runs "
                    f"({str(error).rstrip('.')}); try again when Slurm answers."
                ) from error
        time.sleep(SQUEUE_INTERVAL)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

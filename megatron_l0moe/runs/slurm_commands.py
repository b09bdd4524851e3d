"""Calling Slurm's own commands, and reading what they print. The only place of `launch` that starts them."""

import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs.caller_environment import for_slurm

ANSWER_SECONDS = 60.0
"""The time that one command may take; Slurm's own give up on a controller that does not answer after some 10 s."""
ALIVE = frozenset(
    {
        *("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING"),
        *("REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD", "STAGE_OUT"),
    }
)
"""States of a job that will still do something."""
_UNKNOWN_JOB = "Invalid job id"
_FIELD = re.compile(r"(\w+(?:[:/]\w+)*)=(.*?)(?= \w+(?:[:/]\w+)*=|$)")


class SlurmUnreachableError(L0MoEError):
    """Slurm's commands are not here, or its controller does not answer."""


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What Slurm knows of a job, or of one task of a job array."""

    job: str
    """`12`, or `12_3` for task 3 of an array."""
    state: str
    """Slurm's word: PENDING, RUNNING, COMPLETED, FAILED, TIMEOUT, CANCELLED, NODE_FAIL ..."""
    reason: str = ""
    """Why it waits, as Slurm says it; empty for none."""
    restarts: int = 0
    exit_code: str = ""
    nodes: str = ""
    run_time: str = ""

    @property
    def alive(self) -> bool:
        """Whether it will still do something."""
        return self.state in ALIVE


def submit(script: Path, options: Sequence[str]) -> str:
    """Hand a script to sbatch and return the job's number.

    Raises:
        L0MoEError: sbatch refused it; the message holds its own words.
    """
    answer = _call(["sbatch", "--parsable", *options, str(script)], script)
    if answer.returncode != 0:
        raise L0MoEError(f"sbatch refused {script}: {own_words(answer.stderr)}.")
    return answer.stdout.strip().split(";")[0]


def check(script: Path, options: Sequence[str]) -> None:
    """Ask the cluster whether it takes a script, which is not queued for that.

    `--test-only` refuses in the same words what asks for too much and what only cannot begin now, because nodes are
    down or reserved. So what it refuses is tried: sbatch takes it or not, to begin tomorrow, and it is cancelled at
    once. (Of a job that is held sbatch would take anything.)

    Raises:
        L0MoEError: sbatch refused it; the message holds its own words.
    """
    if _call(["sbatch", "--test-only", *options, str(script)], script).returncode != 0:
        cancel([submit(script, [*options, "--begin=now+1day", "--mail-type=NONE"])])


def cancel(jobs: Sequence[str]) -> None:
    """End jobs, or single tasks of arrays; those that are gone already are no problem.

    Raises:
        L0MoEError: scancel could not do it; the message holds its own words.
    """
    if not jobs:
        return
    answer = _call(["scancel", *jobs])
    if answer.returncode != 0 and _UNKNOWN_JOB not in answer.stderr:
        raise L0MoEError(f"scancel could not end the jobs {' '.join(jobs)}: {own_words(answer.stderr)}.")


def states(jobs: Iterable[str]) -> dict[str, JobState]:
    """Return what Slurm still knows of jobs; a finished job is forgotten after some minutes.

    Args:
        jobs: numbers of jobs; an array is answered by its tasks, `12_0`, `12_1` ...

    Raises:
        SlurmUnreachableError: there is no answer.
    """
    found: dict[str, JobState] = {}
    for job in jobs:
        answer = _call(["scontrol", "--oneliner", "show", "job", job])
        if answer.returncode == 0:
            for line in answer.stdout.splitlines():
                found.update(parse_job(line))
        elif _UNKNOWN_JOB not in answer.stderr + answer.stdout:
            raise SlurmUnreachableError(f"Slurm does not answer: {own_words(answer.stderr)}.")
        else:
            found.update(_from_accounting(job))
    return found


def queue_state(job: str) -> str:
    """Return squeue's word for the state of a job, empty where it knows nothing of it (any more).

    Raises:
        SlurmUnreachableError: there is no answer.
    """
    answer = _call(["squeue", "--noheader", "--states=all", "--jobs", job, "--format=%T"])
    if answer.returncode != 0 and _UNKNOWN_JOB not in answer.stderr:
        raise SlurmUnreachableError(f"Slurm does not answer: {own_words(answer.stderr)}.")
    return next(iter(answer.stdout.split()), "")


def parse_job(line: str) -> dict[str, JobState]:
    """Read one line of `scontrol --oneliner show job`; waiting tasks of an array share one line."""
    fields = dict(_FIELD.findall(line.strip()))
    if "JobId" not in fields or "JobState" not in fields:
        return {}
    array = fields.get("ArrayJobId")
    names = (
        [f"{array}_{task}" for task in parse_array(fields.get("ArrayTaskId", ""))]
        if array
        else [fields["JobId"]]
    )
    reason = fields.get("Reason", "None")
    return {
        name: JobState(
            job=name,
            state=fields["JobState"],
            reason="" if reason == "None" else reason,
            restarts=int(fields.get("Restarts", "0")),
            exit_code=fields.get("ExitCode", ""),
            nodes=fields.get("NodeList", "").replace("(null)", ""),
            run_time=fields.get("RunTime", ""),
        )
        for name in names
    }


def parse_array(text: str) -> list[int]:
    """Read task numbers as Slurm writes them: `0-3,7%2`, `0-6:2`."""
    tasks: list[int] = []
    for part in text.split("%")[0].split(","):
        if found := re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part):
            first, last, step = (int(number) if number else None for number in found.groups())
            assert first is not None
            tasks += range(first, (first if last is None else last) + 1, step or 1)
    return tasks


def own_words(text: str) -> str:
    """Return what a command of Slurm said, on one line and without its name before each part."""
    lines = [
        re.sub(r"^(?:sbatch|scontrol|scancel|squeue): (?:error: )?", "", line) for line in text.splitlines()
    ]
    return "; ".join(line.strip().rstrip(".") for line in lines if line.strip()) or "it did not say why"


def _from_accounting(job: str) -> dict[str, JobState]:
    """Ask sacct, where a cluster has it, for jobs that the controller has forgotten."""
    try:
        answer = _call(
            [
                *("sacct", "--noheader", "--parsable2", "--allocations", "--jobs", job),
                "--format=JobID,State,ExitCode,NodeList,Elapsed",
            ]
        )
    except SlurmUnreachableError:
        return {}
    found = {}
    for line in answer.stdout.splitlines() if answer.returncode == 0 else ():
        fields = line.split("|")
        if len(fields) == 5 and re.fullmatch(r"\d+(?:_\d+)?", fields[0]):
            state = fields[1].split()[0] if fields[1].split() else ""
            found[fields[0]] = JobState(
                job=fields[0], state=state, exit_code=fields[2], nodes=fields[3], run_time=fields[4]
            )
    return found


def _call(words: Sequence[str], script: Path | None = None) -> subprocess.CompletedProcess[str]:
    text = script.read_text(encoding="utf-8") if script else ""
    try:
        return subprocess.run(
            list(words),
            capture_output=True,
            text=True,
            check=False,
            timeout=ANSWER_SECONDS,
            env=for_slurm(os.environ, text),
        )
    except FileNotFoundError as error:
        raise SlurmUnreachableError(
            f"There is no command {words[0]} on this machine; run this where Slurm's commands are, such as a login "
            "node of the cluster."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmUnreachableError(
            f"Slurm does not answer: {words[0]} took over {ANSWER_SECONDS:.0f} s."
        ) from error

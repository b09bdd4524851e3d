"""When attempts end a job, and how Slurm is asked whether the job of an earlier attempt still runs."""

import os
from pathlib import Path

import pytest

from megatron_l0moe.chain import attempts
from megatron_l0moe.errors import L0MoEError

SQUEUE = """#!/bin/sh
echo x >> "$0.calls"
if [ "$(wc -l < "$0.calls")" -lt 3 ]; then echo "slurm_load_jobs error: Unable to contact" >&2; exit 1; fi
if [ "$(wc -l < "$0.calls")" -lt 5 ]; then echo COMPLETING; exit 0; fi
if [ "$4" = 7 ]; then echo RUNNING; else echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; fi
"""


def test_slurm_is_asked_again_while_it_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "SQUEUE_INTERVAL", 0.01)
    program = tmp_path / "squeue"
    program.write_text(SQUEUE)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert attempts._state("7") == "RUNNING"
    assert attempts._state("8") == ""
    (tmp_path / "squeue.calls").unlink()
    monkeypatch.setattr(attempts, "SQUEUE_SECONDS", 0.0)
    with pytest.raises(
        L0MoEError, match=r"the Slurm job 7, .* still runs \(.*Unable to contact\); try again"
    ):
        attempts._state("7")


def attempt(how: attempts.How, last: int, saved: int = 0, *, saving: bool = False) -> attempts.Attempt:
    """Return an attempt that began at step 0."""
    return attempts.Attempt(
        number=1, started="", host="", job="", restarts=0, start_step=0, logs="", metrics_time=0, ended="x",
        how=how, last_step=last, saved_step=saved, saving=saving,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ends", "why"),
    [
        ("c7 c7", "crashed in step 8 in 2 attempts in a row"),
        ("c7 c6", None),
        ("c7 c6 c5", "ended in 3 attempts in a row without a new checkpoint"),
        ("s8 s8", "crashed while saving after step 8 in 2 attempts in a row"),
        ("s8 c8", None),
        ("v0 v0", None),
        ("v0 v0 v0", "vanished in step 1 in 3 attempts in a row"),
        ("v0 v0 v1 v0 v0", None),
        ("c7 v7", "ended in step 8 in 2 attempts in a row"),
        ("v7 c7", "ended in step 8 in 2 attempts in a row"),
        ("c6 v7 c6", None),
        ("v1 v2 v3 v1 v2 v3 v1 v2 v3", None),
        ("v1 v2 v3 v1 v2 v3 v1 v2 v3 v1", "vanished in 10 attempts in a row without a new checkpoint"),
        ("v1 v2 v3 v1 v2 v3 v1 v2 +v3 v1", None),
        ("i0 i0 i0 i0", None),
        ("i7 i7 c3", "ended in 3 attempts in a row without a new checkpoint"),
    ],
)
def test_when_attempts_end_a_job(ends: str, why: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each letter is how an attempt ended, the number its last step; `+`: it left a new checkpoint."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    hows: dict[str, attempts.How] = {"c": "crashed", "s": "crashed", "v": "vanished", "i": "interrupted"}
    past = [
        attempt(hows[end[0]], int(end[1:]), saved=1 if word != end else 0, saving=end[0] == "s")
        for word in ends.split()
        for end in [word.lstrip("+")]
    ]
    assert attempts.judge(past) == why

"""How Slurm is asked whether the job of an earlier attempt still runs."""

import os
from pathlib import Path

import pytest

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.launch import attempts

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

"""Stand-ins for sbatch, scontrol and scancel on PATH: they note how they were called and answer from files."""

import os
from pathlib import Path

import pytest

SBATCH = """#!/bin/bash
script=${!#}
name=$(basename "$script" .sbatch)
if [ "$1" = --test-only ]; then
  echo "$*" >> "$FAKE/test_only.log"
  if [ -e "$FAKE/refuse_asked_$name" ]; then cat "$FAKE/refuse_asked_$name" >&2; exit 1; fi
  echo "sbatch: Job 1 to start at 2026-01-01T00:00:00 using 1 processors on nodes n1 in partition batch" >&2
  exit 0
fi
if [ -e "$FAKE/refuse_$name" ]; then cat "$FAKE/refuse_$name" >&2; exit 1; fi
number=$(($(cat "$FAKE/number" 2> /dev/null || echo 100) + 1))
echo "$number" > "$FAKE/number"
echo "$number $*" >> "$FAKE/sbatch.log"
env | grep -E '^(SLURM_|SBATCH_|L0MOE_)' >> "$FAKE/sbatch.env"
if ! [ -e "$script" ]; then echo "no script" >&2; exit 1; fi
array=$(grep -o 'array=[^ ]*' <<< "$*" | head -n 1 | cut -d= -f2)
tasks=
[ -n "$array" ] && tasks="ArrayJobId=$number ArrayTaskId=$array "
echo "JobId=$number ${tasks}JobName=x JobState=PENDING Reason=Dependency Restarts=0" > "$FAKE/job_$number"
echo "$number;cluster"
"""
SCONTROL = """#!/bin/bash
if [ -e "$FAKE/down" ]; then
  echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2
  exit 1
fi
job=${!#}
if ! [ -e "$FAKE/job_$job" ]; then echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; fi
cat "$FAKE/job_$job"
"""
SCANCEL = """#!/bin/bash
echo "$*" >> "$FAKE/scancel.log"
for job in "$@"; do rm -f "$FAKE/job_$job"; done
"""
SACCT = """#!/bin/bash
echo "Slurm accounting storage is disabled" >&2
exit 1
"""


class FakeSlurm:
    """The folder that the stand-ins answer from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def calls(self, name: str) -> list[str]:
        """Return how a command was called, oldest first."""
        file = self.folder / f"{name}.log"
        return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []

    def set_job(self, number: str, *lines: str) -> None:
        """Say what scontrol answers about a job."""
        (self.folder / f"job_{number}").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def forget(self, number: str) -> None:
        """Let scontrol not know a job any more."""
        (self.folder / f"job_{number}").unlink()

    def refuse(self, stage: str, words: str, *, asked: bool = True, submitted: bool = True) -> None:
        """Let sbatch refuse the script of a stage: when it is asked with --test-only, when it is submitted, or both."""
        for wanted, name in ((asked, f"refuse_asked_{stage}"), (submitted, f"refuse_{stage}")):
            if wanted:
                (self.folder / name).write_text(words, encoding="utf-8")

    def stop_controller(self) -> None:
        """Let the controller not answer."""
        (self.folder / "down").touch()


def make_fake_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Put the stand-ins first on PATH."""
    state, commands = folder / "fake_slurm", folder / "bin"
    state.mkdir()
    commands.mkdir()
    for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL), ("scancel", SCANCEL), ("sacct", SACCT)):
        (commands / name).write_text(text, encoding="utf-8")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(state))
    return FakeSlurm(state)

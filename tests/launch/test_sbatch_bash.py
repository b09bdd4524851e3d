"""What a training job's script does with verdicts, signals and late files; srun, scontrol and squeue are stand-ins."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from toy_recipe import make_run, toy_architecture

from megatron_l0moe.chain.slurm.cluster import Cluster
from megatron_l0moe.chain.slurm.sbatch import FUNCTIONS, render
from megatron_l0moe.chain.stages import place_of

SRUN = """#!/bin/bash
case "$*" in
  *"--phase prepare"*)
    echo prepare >> steps
    [ -n "$PREPARE_VERDICT" ] && echo "$PREPARE_VERDICT" > runs/toy/moe/verdict
    exit "${PREPARE:-0}" ;;
  *"--phase finish"*)
    echo finish >> steps
    [ -n "$VERDICT" ] && echo "$VERDICT" > runs/toy/moe/verdict
    [ -n "$MARKER" ] && : > runs/toy/moe/DONE
    exit 143 ;;
  *torch.distributed.run*)
    echo train >> steps
    for i in $(seq "${TENTHS:-0}"); do
      [ -e runs/toy/moe/stop ] && { echo stopped >> steps; exit 143; }
      /bin/sleep 0.1
    done
    exit 1 ;;
  *) echo "other: $*" >> steps; exit 0 ;;
esac
"""
SCONTROL = """#!/bin/bash
if [ "$1" = requeue ]; then echo "requeue $2" >> steps; else echo n1; fi
"""
SQUEUE = """#!/bin/bash
echo "${STATE:-RUNNING}"
"""
SLEEP = """#!/bin/bash
[ "$1" = infinity ] && exit 77
exec /bin/sleep 0.01
"""
WAITS = 77
"""Exit code of the stand-in that a script waits in, once it is queued again."""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("squeue", SQUEUE), ("sleep", SLEEP)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    made = make_run(tmp_path)
    run = type(made)(recipe=made.recipe, recipe_file=Path("recipe.yaml"), runs_dir=Path("runs"))
    for stage in ("curate", "assemble", "moe"):
        (tmp_path / "runs" / "toy" / stage).mkdir(parents=True)
    for stage in ("curate", "assemble"):
        (tmp_path / "runs" / "toy" / stage / "DONE").touch()
    cluster = Cluster(gpus_per_node=0, cpus_per_node=4, file_wait_seconds=3, max_requeues=2)
    file = tmp_path / "moe.sbatch"
    file.write_text(render(run, toy_architecture(), cluster, "moe", place_of(run)))
    return file


def start(script: Path, **env: str) -> "subprocess.Popen[str]":
    folder = script.parent
    variables = {
        "SLURM_JOB_ID": "5",
        "SLURM_JOB_NODELIST": "n1",
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
    }
    return subprocess.Popen(
        ["bash", str(script)], cwd=folder, env={**os.environ, **variables, **env}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def outcome(script: Path, **env: str) -> tuple[int, list[str], str]:
    """Run the script; returns exit code, steps and output."""
    process = start(script, **env)
    said, _ = process.communicate(timeout=30)
    steps = script.parent / "steps"
    return process.returncode, steps.read_text().splitlines() if steps.is_file() else [], said


@pytest.mark.parametrize(
    ("env", "code", "steps"),
    [
        ({"VERDICT": "done", "MARKER": "1"}, 0, ["prepare", "train", "finish"]),
        ({"VERDICT": "again"}, WAITS, ["prepare", "train", "finish", "requeue 5"]),
        ({"VERDICT": "stop"}, 1, ["prepare", "train", "finish"]),
        ({}, WAITS, ["prepare", "train", "finish", "requeue 5"]),
        ({"SLURM_RESTART_COUNT": "2"}, 1, ["prepare", "train", "finish"]),
        ({"VERDICT": "again", "SLURM_RESTART_COUNT": "9"}, WAITS, ["prepare", "train", "finish", "requeue 5"]),
        ({"PREPARE": "2"}, 1, ["prepare"]),
        ({"PREPARE": "1"}, WAITS, ["prepare", "requeue 5"]),
        ({"PREPARE_VERDICT": "done"}, WAITS, ["prepare", "requeue 5"]),
        ({"VERDICT": "again", "STATE": "COMPLETING"}, 1, ["prepare", "train", "finish"]),
    ],
    ids=[
        *("done", "again", "stop", "no verdict", "no verdict too often", "again is not counted", "refused"),
        *("prepare could not run", "done without its marker", "cancelled"),
    ],
)  # fmt: skip
def test_verdict(script: Path, env: dict[str, str], code: int, steps: list[str]) -> None:
    """Exit code 0 only with the marker; a job that is being cancelled is not queued again."""
    found = outcome(script, **env)
    assert found[:2] == (code, steps), found[2]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_asks_training_to_stop_and_is_waited_for(script: Path, number: int) -> None:
    process = start(script, TENTHS="100", VERDICT="again")
    steps = script.parent / "steps"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not (steps.is_file() and "train" in steps.read_text()):
        time.sleep(0.05)
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert steps.read_text().splitlines() == ["prepare", "train", "stopped", "finish", "requeue 5"], said
    assert f"got {signal.Signals(number).name[3:]}" in said


def test_a_late_file_is_waited_for_and_then_named(script: Path) -> None:
    marker = script.parent / "runs" / "toy" / "assemble" / "DONE"
    marker.unlink()
    code, steps, said = outcome(script)
    assert (code, steps) == (1, [])
    assert "runs/toy/assemble/DONE is not visible on n1 after 3 s" in said


def test_a_stage_that_is_done_is_left_alone(script: Path) -> None:
    (script.parent / "runs" / "toy" / "moe" / "DONE").touch()
    assert outcome(script)[:2] == (0, [])


def test_the_exit_code_of_a_command_that_ends_at_once_is_its_own() -> None:
    """The shell may have taken note of its end before the first look; code 1 then came of a command that did well."""
    function = FUNCTIONS[FUNCTIONS.index("run() {") : FUNCTIONS.index('say "job')]
    program = f"""set -uo pipefail
{function}
for i in {{1..200}}; do run true || echo wrong; run bash -c "exit 7"; [ $? = 7 ] || echo wrong; done
"""
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

"""How a training job that ended early is met on one machine; stand-ins for the job write what it would write."""

import sys
from pathlib import Path

import pytest
from toy_recipe import make_run

from megatron_l0moe.chain import run_local, training_commands
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs.stage_folder import StageFolder
from megatron_l0moe.runs.stages import stages

PROGRAM = """
import sys
from pathlib import Path
from megatron_l0moe.runs.training_end import Failure, write_failure
folder = Path(sys.argv[1])
assert not (folder / "stop").exists(), "a stop request of an earlier start"
(folder / "starts").open("a").write("x")
{}
sys.exit(1)
"""
NAN = 'write_failure(folder, Failure(kind="nan", sentence="Step 4 is broken.", step=4))'
REFUSED = 'write_failure(folder, Failure(kind="refused", sentence="The layout is wrong."))'
STOPPED = '(folder / "stopped").write_text("4")'


@pytest.fixture
def stage(tmp_path: Path) -> StageFolder:
    stage = stages(make_run(tmp_path), "moe")[0]
    stage.folder.mkdir(parents=True)
    return stage


def train(stage: StageFolder, what: str) -> None:
    command = [sys.executable, "-c", PROGRAM.format(what), str(stage.folder)]
    run = make_run(stage.folder.parents[1])
    run_local._train(run, training_commands.TrainingCommand(command=command, env={}), stage, 20)


def starts(stage: StageFolder) -> int:
    return len((stage.folder / "starts").read_text())


def test_a_nan_is_said_again_and_not_tried_again(stage: StageFolder) -> None:
    for _ in range(3):
        with pytest.raises(L0MoEError, match=r"^Step 4 is broken\.$"):
            train(stage, NAN)
        assert starts(stage) == 1
    (stage.folder / "failure.json").unlink()
    with pytest.raises(L0MoEError, match=r"^Step 4 is broken\.$"):
        train(stage, NAN)
    assert starts(stage) == 2


def test_a_refusal_is_tried_again(stage: StageFolder) -> None:
    for count in (1, 2):
        with pytest.raises(L0MoEError, match=r"^The layout is wrong\.$"):
            train(stage, REFUSED)
        assert starts(stage) == count


def test_a_stop_is_no_error_of_the_job_and_is_forgotten_at_the_next_start(stage: StageFolder) -> None:
    (stage.folder / "stop").touch()
    with pytest.raises(
        L0MoEError, match=r"moe was stopped after step 4 of 20; run the same command to go on\.$"
    ):
        train(stage, STOPPED)
    with pytest.raises(L0MoEError, match="failed with exit code 1"):
        train(stage, "")


def test_a_damaged_failure_file_is_named(stage: StageFolder) -> None:
    (stage.folder / "failure.json").write_text("{")
    with pytest.raises(L0MoEError, match=r"failure\.json is not valid JSON .*; remove it to go on"):
        train(stage, NAN)

"""Jobs that end before their last step: asked to by the stop file, or because their numbers are no numbers.

Real `megatron_l0moe.training.pretrain` jobs in gloo processes. The one that is asked to stop has two of them, under
torchrun as in a run; the others share their processes to save starts.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed import resume_world as toy
from processes import PATIENCE

from megatron_l0moe.runs.training_end import FAILURE_FILE, STOPPED, read_failure, stopped_at

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

CASE = toy.Case("expert", "bf16", "distributed")
ASKED_AFTER = 3
NAN, INF = "found NaN in local grad norm", "found Inf in local grad norm"
BROKEN = [
    ("nan_loss", "fp32", NAN),
    ("nan_loss", "bf16", NAN),
    ("infinite_gradient", "fp32", INF),
    ("infinite_gradient", "bf16", INF),
    ("unseen_nan", "bf16", "the lm loss is nan"),
]


def run(folder: Path, index: Path, *more: str, broken: str = "", case: toy.Case = CASE) -> dict:
    """Return a job that saves only at its end, or when it is asked to."""
    flags = ["--l0-stop-file", str(folder / "stop"), "--save-interval", "100", "--rerun-mode", "disabled"]
    return toy.run(case, folder, index, toy.layout(), *flags, *more, broken=broken)


def train_until_asked(folder: Path, index: Path, log: Path) -> int:
    """Train in two processes, write the stop file after a few steps; returns torchrun's exit code."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = run(folder, index, "--async-save")["argv"]  # the save has to be complete all the same
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*words, "-m", "megatron_l0moe.training.pretrain", *argv],
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    deadline = time.monotonic() + 10 * PATIENCE
    rows = folder / "metrics.jsonl"
    while process.poll() is None and (not rows.is_file() or rows.read_bytes().count(b"\n") < ASKED_AFTER):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    (folder / "stop").touch()
    return process.wait(10 * PATIENCE)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is stopped, then resumed, and one that is not, in two processes; and a control."""
    root = tmp_path_factory.mktemp("stop")
    index = toy.write_indexes(root / "index")
    folder = root / "stopped"
    code = train_until_asked(folder, index, root / "stop.log")
    (root / "end.json").write_text(
        json.dumps({"code": code, "stopped": stopped_at(folder), "losses": toy.losses(folder)})
    )
    (folder / "stop").unlink()
    plan = [run(root / "straight", index), run(folder, index)]
    step = stopped_at(folder)
    control = toy.stopped(folder, step, root / "control")
    plan.append(run(control, index, broken="data_from_the_start"))
    toy.launch(2, plan, root / "two.log")
    return root


def test_the_stop_file_saves_that_step_and_ends_the_job(root: Path) -> None:
    end = json.loads((root / "end.json").read_text())
    assert end["code"] != 0
    assert f"(exitcode: {STOPPED})" in (root / "stop.log").read_text()
    assert ASKED_AFTER <= end["stopped"] < toy.STEPS
    assert len(end["losses"]) == end["stopped"]
    assert (root / "stopped" / f"iter_{end['stopped']:07d}" / "metadata.json").is_file()


def test_the_stopped_run_goes_on_bit_for_bit(root: Path) -> None:
    straight, resumed, control = (toy.opened(root / name) for name in ("straight", "stopped", "control"))
    assert toy.losses(root / "straight") == toy.losses(root / "stopped")
    assert max(toy.differences(straight, resumed).values()) == 0
    assert toy.position(straight) == toy.position(resumed)
    assert max(toy.differences(straight, control).values()) > 0


@pytest.fixture(scope="module")
def numbers(root: Path) -> Path:
    """Runs whose numbers go wrong, in one process one after another."""
    index, plan = root / "index", []
    for fault, precision, _ in BROKEN:
        case = toy.Case("moe", precision, "distributed")
        plan.append(run(root / f"{fault}_{precision}", index, broken=fault, case=case))
    first = run(root / "first_step", index, "--rerun-mode", "validate_results", broken="nan_from_the_start")
    toy.launch(1, [*plan, first], root / "numbers.log")
    return root


@pytest.mark.parametrize(("fault", "precision", "what"), BROKEN)
def test_a_number_that_is_none_ends_the_job_and_names_its_samples(
    numbers: Path, fault: str, precision: str, what: str
) -> None:
    folder = numbers / f"{fault}_{precision}"
    failure = read_failure(folder)
    assert failure is not None
    assert (failure.kind, failure.step) == ("nan", 4)
    assert failure.sentence.startswith(f"Training stopped in step 4 of {toy.STEPS}, because {what}")
    assert (
        f"it read samples 12 to 15 of {numbers / 'index' / 'moe'} (domains 0, 1, 2, 3; " in failure.sentence
    )
    assert failure.sentence.endswith(f"remove {folder / FAILURE_FILE} to go on from the last checkpoint.")
    assert [sample["sample"] for sample in failure.samples] == [12, 13, 14, 15]
    assert len(toy.losses(folder)) == 3
    assert not list(folder.glob("iter_*"))  # weights that are no numbers are not saved


def test_the_first_step_after_a_start_is_checked_too(numbers: Path) -> None:
    failure = read_failure(numbers / "first_step")
    assert failure is not None
    assert failure.step == 1

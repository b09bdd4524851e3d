"""`--phase prepare` and `--phase finish` around a stand-in for training that writes what a job would write."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from toy_recipe import make_run, write_model
from typer.testing import CliRunner

from megatron_l0moe import cli
from megatron_l0moe.chain import attempts, batch_phases, run_local, training_commands
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.index.index import DOC, ClusterBlock, IterationBlock, Shard, write_index
from megatron_l0moe.runs import stage_folder
from megatron_l0moe.runs.stage_folder import StageFolder
from megatron_l0moe.runs.stages import Run
from megatron_l0moe.runs.training_end import STOPPED, Failure, read_failure, write_failure

STEPS = 20  # of MoE training in the toy recipe


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose stages before MoE training are done."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(stage_folder, "LATE_SECONDS", 0.2)
    monkeypatch.setattr(stage_folder, "INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr(run_local, "record_start", note_start)  # the real one lists all packages: slow
    model = write_model(tmp_path / "model")
    (tmp_path / "runs").mkdir()
    run = make_run(tmp_path, model__path=str(model), data__corpus=str(tmp_path))
    for name in ("convert", "curate", "experts", "assemble"):
        run_local.carry_out(run, name, lambda stage: {})
    return run


def note_start(run: Run, job: training_commands.TrainingCommand, stage: StageFolder) -> None:
    with (stage.folder / "starts").open("a") as file:
        file.write("x")


def write_moe_index(prefix: Path) -> None:
    """Write an index of 40 samples: 10 of each of the K = 4 domains, whose one document is long enough."""
    samples, length = 10, 32
    documents = [
        ClusterBlock(k, np.array([(0, k)], dtype=DOC), np.array([samples * length + 1])) for k in range(4)
    ]
    shard = Shard("iter_001/shard_00000", "0", "0", 4, 4 * (samples * length + 1))
    write_index(
        prefix, [IterationBlock(1, [shard], documents, samples)], kind="moe", num_domains=4, iterations=2,
        seq_length=length, d_ds=[0.1], sequences_per_domain=1, rotate=False, tokenizer_sha256="t", vocab_size=9, eod=0,
    )  # fmt: skip


def work(stage: StageFolder) -> dict[str, object]:
    return {"steps": STEPS}


def prepare(run: Run) -> int:
    return batch_phases.run_phase(run, "moe", "prepare", work)


def finish(run: Run) -> int:
    return batch_phases.run_phase(run, "moe", "finish", work)


def folder(run: Run) -> Path:
    return run.stage_folder("moe")


def verdict(run: Run) -> str:
    file = folder(run) / "verdict"
    return file.read_text() if file.is_file() else ""


def save(run: Run, step: int) -> None:
    path = folder(run) / "checkpoints" / "latest_checkpointed_iteration.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{step}")


def train(run: Run, first: int, last: int, error: str = "") -> None:
    """Do what a job does in the steps `first` to `last`; `error` is the last line of its log."""
    file = folder(run) / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    lines = [line for line in lines if json.loads(line)["iteration"] < first]
    rows = [*lines, *(json.dumps({"iteration": step}) for step in range(first, last + 1))]
    file.write_text("".join(f"{row}\n" for row in rows))
    before = attempts.read(folder(run))[-1].metrics_time
    os.utime(file, ns=(before + 1000, before + 1000))  # the clock of a file system may be coarse
    (folder(run) / "train.log").write_text(f"training\n{error}\n")


def crash(run: Run, first: int, last: int, error: str = "RuntimeError: boom") -> int:
    assert prepare(run) == 0
    train(run, first, last, error)
    return finish(run)


def records(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder(run) / "attempts.jsonl").read_text().splitlines()]


def test_trained_at_the_first_attempt(run: Run) -> None:
    assert prepare(run) == 0
    assert verdict(run) == ""
    train(run, 1, STEPS)
    save(run, STEPS)
    assert finish(run) == 0
    assert verdict(run) == "done\n"
    assert (folder(run) / "DONE").is_file()
    (record,) = records(run)
    assert (record["number"], record["how"], record["last_step"], record["verdict"]) == (
        1,
        "finished",
        STEPS,
        "done",
    )
    assert (folder(run) / "starts").read_text() == "x"
    assert prepare(run) == 0  # a job that is requeued after all
    assert verdict(run) == "done\n"
    assert len(records(run)) == 1


def test_a_clean_stop_goes_on_however_often(run: Run) -> None:
    for step in range(2, 8):
        assert prepare(run) == 0
        assert not (folder(run) / "stop").exists()
        (folder(run) / "stop").touch()
        train(run, step, step)
        save(run, step)
        (folder(run) / "stopped").write_text(f"{step}\n")
        assert finish(run) == STOPPED
        assert verdict(run) == "again\n"
    assert {record["how"] for record in records(run)} == {"stopped"}
    assert [record["start_step"] for record in records(run)] == [0, 2, 3, 4, 5, 6]


def test_a_second_crash_in_the_same_step_stops(run: Run) -> None:
    assert crash(run, 1, 6) == STOPPED
    with pytest.raises(
        L0MoEError, match=r"moe crashed in step 7 in 2 attempts in a row .*RuntimeError: boom"
    ) as caught:
        crash(run, 1, 6)
    assert "step 7 reads samples" in str(caught.value)
    assert verdict(run) == "stop\n"
    with pytest.raises(L0MoEError, match="step 7") as again:
        prepare(run)
    assert str(again.value) == str(caught.value)
    (folder(run) / "failure.json").unlink()
    assert crash(run, 1, 6) == STOPPED  # somebody decided to go on, so the count begins anew


def test_the_samples_of_the_step_are_named(run: Run) -> None:
    prefix = run.stage_folder("curate") / "moe"
    write_moe_index(prefix)
    assert crash(run, 1, 6) == STOPPED
    with pytest.raises(
        L0MoEError, match=rf"step 7 reads samples 24 to 27 of {prefix} \(domains 0, 1, 2, 3; "
    ):
        crash(run, 1, 6)
    failure = read_failure(folder(run))
    assert failure is not None
    assert [sample["sample"] for sample in failure.samples] == [24, 25, 26, 27]
    assert [(sample["document"], sample["offset"]) for sample in failure.samples] == [
        (k, 6 * 32) for k in range(4)
    ]


def test_the_command(run: Run) -> None:
    def l0moe(*words: str) -> "Result":
        return CliRunner().invoke(cli.app, [*words, "--runs-dir", str(run.runs_dir)])

    recipe = str(run.recipe_file)
    assert l0moe("moe", recipe, "--phase", "prepare").exit_code == 0
    assert l0moe("moe", recipe, "--phase", "finish").exit_code == STOPPED
    for wrong in (["moe", recipe, "--phase", "again"], ["experts", recipe, "--phase", "prepare"]):
        done = l0moe(*wrong)
        assert done.exit_code == 2
        assert "--phase" in done.stderr
    l0moe("moe", recipe, "--phase", "prepare")
    done = l0moe("moe", recipe, "--phase", "finish")
    assert (done.exit_code, verdict(run)) == (2, "stop\n")
    assert "crashed in step 1 in 2 attempts in a row" in done.stderr
    (run.expert_folder(1) / "DONE").unlink()
    assert l0moe("experts", recipe, "--index", "1", "--phase", "prepare").exit_code == 0


def test_crashes_in_other_steps_stop_later_and_checkpoints_reset_the_count(run: Run) -> None:
    assert [crash(run, 1, last) for last in (3, 5)] == [STOPPED, STOPPED]
    assert prepare(run) == 0
    train(run, 1, 9, "RuntimeError: boom")
    save(run, 8)
    assert finish(run) == STOPPED
    assert [crash(run, 9, last) for last in (10, 11)] == [STOPPED, STOPPED]
    with pytest.raises(L0MoEError, match="ended in 3 attempts in a row without a new checkpoint"):
        crash(run, 9, 12)


def test_stops_that_come_too_late_to_save_end_a_job_that_gets_nowhere(run: Run) -> None:
    for _ in range(4):  # asked before the first step: nothing is lost, so it may happen again and again
        assert prepare(run) == 0
        (folder(run) / "stop").touch()
        assert finish(run) == STOPPED
    for _ in range(2):
        assert prepare(run) == 0
        train(run, 1, 9)
        (folder(run) / "stop").touch()
        assert finish(run) == STOPPED
    assert prepare(run) == 0
    train(run, 1, 9)
    (folder(run) / "stop").touch()
    with pytest.raises(
        L0MoEError, match=r"ended in 3 attempts .* \(the last time: it was asked to stop, and ended"
    ):
        finish(run)


def test_a_stop_request_outlives_prepare_unless_it_is_an_earlier_attempts(run: Run) -> None:
    assert prepare(run) == 0
    (folder(run) / "stop").touch()  # and then the node dies
    assert prepare(run) == 0
    assert not (folder(run) / "stop").exists()
    assert finish(run) == STOPPED
    (folder(run) / "stop").touch()  # before the next attempt's `prepare` has done anything
    assert prepare(run) == 0
    assert (folder(run) / "stop").exists()
    assert finish(run) == STOPPED
    assert [record["how"] for record in records(run)] == ["interrupted", "crashed", "interrupted"]


def test_attempts_that_vanish_are_judged_when_the_next_one_begins(run: Run) -> None:
    for last in (0, 0, 7, 7, 7):
        assert prepare(run) == 0
        if last:
            train(run, 1, last)  # and then the node dies: no `finish`
    with pytest.raises(L0MoEError, match=r"moe vanished in step 8 in 3 attempts in a row; step 8 reads"):
        prepare(run)
    assert verdict(run) == "stop\n"
    assert [record["how"] for record in records(run)] == ["vanished"] * 5


@pytest.mark.parametrize("cause", ["NODE FAILURE", "PREEMPTION"])
def test_a_stop_request_that_came_with_a_lost_node(
    run: Run, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    """Slurm ends the batch script by TERM, which asks training to stop; `finish` cannot run any more."""
    logs = run.folder / "slurm" / "logs"
    monkeypatch.setenv("L0MOE_LOG_DIR", str(logs / "moe" / "18_r0"))
    assert prepare(run) == 0
    train(run, 1, 7)
    (folder(run) / "stop").touch()
    logs.mkdir(parents=True)
    (logs / "moe-18.log").write_text(
        "10:53:51 | moe: job 18 on n[1,3], start 1\n"
        f"slurmstepd-n1: error: *** JOB 18 ON n1 CANCELLED AT 2026-11-22T10:55:40 DUE TO {cause} ***\n"
        "10:56:33 | moe: job 18 on n[1,3], start 2\n"
    )
    assert prepare(run) == 0
    (first, _) = records(run)
    if cause == "NODE FAILURE":
        assert (first["how"], first["reason"]) == ("vanished", attempts.NODE_LOST)
    else:
        assert (first["how"], first["reason"]) == ("interrupted", attempts.NOT_SAVED)


@pytest.mark.parametrize("interval", [5, None])
def test_a_crash_while_saving(run: Run, interval: int | None) -> None:
    """After a step that a checkpoint is due after, and after the last one, which is always saved."""
    step = interval or STEPS
    if interval:  # another interval is no other recipe
        training = run.recipe.moe_training.model_copy(update={"save_interval": interval})
        run = replace(run, recipe=run.recipe.model_copy(update={"moe_training": training}))
    error = "OSError: [Errno 28] No space left on device"
    assert crash(run, 1, step - 1, error) == STOPPED
    assert crash(run, 1, step, error) == STOPPED
    with pytest.raises(
        L0MoEError,
        match=rf"crashed while saving after step {step} in 2 attempts in a row \(.* OSError: .*\); mend the cause",
    ):
        crash(run, 1, step, error)
    failure = read_failure(folder(run))
    assert failure is not None
    assert (failure.step, failure.samples) == (step, [])
    (folder(run) / "failure.json").unlink()
    assert prepare(run) == 0
    train(run, 1, step, error)
    save(run, step)
    assert finish(run) == (STOPPED if interval else 0)
    assert [record["saving"] for record in records(run)] == [False, True, True, False]


def test_an_attempt_that_finished_no_step_is_not_told_by_the_rows_of_the_one_before(run: Run) -> None:
    assert prepare(run) == 0
    train(run, 1, 9, "RuntimeError: boom")
    save(run, 5)
    assert finish(run) == STOPPED
    assert prepare(run) == 0
    (folder(run) / "train.log").write_text("ValueError: early\n")
    assert finish(run) == STOPPED
    assert [(r["start_step"], r["last_step"]) for r in records(run)] == [(0, 9), (5, 5)]
    assert records(run)[-1]["reason"] == "ValueError: early"


def test_what_a_job_says_itself_stops_it_at_once(run: Run) -> None:
    assert prepare(run) == 0
    write_failure(folder(run), Failure(kind="nan", sentence="Training stopped in step 4.", step=4))
    for phase in (finish, prepare, prepare):
        with pytest.raises(L0MoEError, match=r"^Training stopped in step 4\.$"):
            phase(run)
        assert verdict(run) == "stop\n"
    (folder(run) / "failure.json").unlink()
    assert prepare(run) == 0


def test_a_refusal_does_not_block_the_next_start(run: Run) -> None:
    assert prepare(run) == 0
    write_failure(folder(run), Failure(kind="refused", sentence="The layout is wrong."))
    with pytest.raises(L0MoEError, match="The layout is wrong"):
        finish(run)
    assert prepare(run) == 0


@pytest.mark.parametrize(
    ("state", "refused"), [("RUNNING", True), ("PENDING", True), ("FAILED", False), ("", False)]
)
def test_another_job_in_the_folder(
    run: Run, monkeypatch: pytest.MonkeyPatch, state: str, refused: bool
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert prepare(run) == 0
    (folder(run) / "stop").touch()
    monkeypatch.setattr(attempts, "_state", lambda job: state if job == "7" else "")
    assert prepare(run) == 0  # the same job, requeued
    (folder(run) / "stop").touch()
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    if refused:
        with pytest.raises(
            L0MoEError, match=rf"The Slurm job 7 \({state.lower()}\) works on .*moe; .* `scancel 7`"
        ):
            prepare(run)
        assert (folder(run) / "stop").exists()
        assert verdict(run) == ""
        assert len(records(run)) == 2
    else:
        assert prepare(run) == 0


def test_only_attempts_of_one_job_count(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "_state", lambda job: "")
    for job in ("7", "8", "9"):  # each submitted by a person
        monkeypatch.setenv("SLURM_JOB_ID", job)
        assert crash(run, 1, 6) == STOPPED
    with pytest.raises(L0MoEError, match="crashed in step 7"):
        crash(run, 1, 6)


def test_late_marker_of_an_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = run.stage_folder("assemble") / "DONE"
    text = marker.read_text()
    marker.unlink()
    with pytest.raises(L0MoEError, match=r"needs .*assemble, which is not finished"):
        prepare(run)
    monkeypatch.setattr(stage_folder.time, "sleep", lambda seconds: marker.write_text(text))
    assert prepare(run) == 0


def test_one_expert(run: Run, tmp_path: Path) -> None:
    (run.expert_folder(2) / "DONE").unlink()
    with pytest.raises(L0MoEError, match="--phase needs --index K"):
        batch_phases.run_phase(run, "experts", "prepare", work)
    with pytest.raises(L0MoEError, match="--phase must be prepare or finish, got 'train'"):
        batch_phases.run_phase(run, "experts", "train", work, index=2)
    assert batch_phases.run_phase(run, "experts", "prepare", work, index=2) == 0
    assert (run.expert_folder(2) / "attempts.jsonl").is_file()
    (run.expert_folder(2) / "extraction.json").write_text(
        "{}"
    )  # trained and cut, but killed before the marker
    assert batch_phases.run_phase(run, "experts", "finish", work, index=2) == 0
    assert (run.expert_folder(2) / "DONE").is_file()

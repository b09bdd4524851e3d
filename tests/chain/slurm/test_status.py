"""What `l0moe status` says: from folders, from Slurm where it answers, from the logs."""

import json
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm, make_fake_slurm
from rich.console import Console
from toy_recipe import make_run

from megatron_l0moe.chain.slurm.status import Row, rows, show
from megatron_l0moe.chain.slurm.submit import RunJobs, SubmittedJob, read_record, write_record
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs.child_process import TAIL_BYTES, lost_a_node, reason
from megatron_l0moe.runs.slurm_commands import JobState, parse_array, parse_job
from megatron_l0moe.runs.stage_folder import MARKER, write_json
from megatron_l0moe.runs.stages import STAGE_NAMES, Run

LOG = """\
10:00:00 | moe: job 105 on n[1-2], start 1
[rank0]: RuntimeError: of the first start
10:01:00 | moe: queued again, after a checkpoint
10:02:00 | moe: job 105 on n[1-2], start 2
[rank3]: Traceback (most recent call last):
[rank3]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB
srun: error: n1: task 0: Exited with exit code 1
10:03:00 | moe: torchrun ended with exit code 1
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = make_run(tmp_path)
    write_json(made.folder / "recipe.json", made.recipe.model_dump())
    return made


def submitted(run: Run) -> RunJobs:
    """Return the record of a whole chain, jobs 101 to 108."""
    jobs = [
        SubmittedJob(
            stage=name,
            job=str(number),
            submitted="2026-01-01T00:00:00+00:00",
            after=[],
            script=f"{name}.sbatch",
            log=str(run.folder / "slurm" / "logs" / f"{name}-{'%A_%a' if name == 'experts' else '%j'}.log"),
            array="0-3%2" if name == "experts" else None,
            nodes=1,
            gpus=8,
        )
        for number, name in enumerate(STAGE_NAMES, 101)
    ]
    return RunJobs(recipe_file="recipe.yaml", cluster_file="cluster.yaml", jobs=jobs)


def mark_done(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / MARKER).write_text("x\n")


def write_log(run: Run, name: str, text: str) -> Path:
    file = run.folder / "slurm" / "logs" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def found(lines: list[Row], stage: str, expert: int | None = None) -> Row:
    return next(line for line in lines if (line.stage, line.expert) == (stage, expert))


def state(job: str, word: str, why: str = "", restarts: int = 0) -> dict[str, JobState]:
    return {job: JobState(job=job, state=word, reason=why, restarts=restarts)}


def test_states_of_a_chain(run: Run) -> None:
    mark_done(run.stage_folder("convert"))
    mark_done(run.expert_folder(0))
    metrics = [{"iteration": k, "lm_loss": 5.0 - k, "seconds": 0.5} for k in (1, 2, 3)]
    run.expert_folder(1).mkdir(parents=True)
    (run.expert_folder(1) / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in metrics))
    known = (
        state("102", "COMPLETED")
        | state("103_1", "RUNNING", restarts=2)
        | state("103_2", "PENDING", "JobArrayTaskLimit")
        | state("103_3", "TIMEOUT")
        | state("104", "PENDING", "Dependency")
    )
    write_log(run, "experts-103_3.log", "slurmstepd: error: *** JOB 9 CANCELLED DUE TO TIME LIMIT ***\n")
    lines = rows(run, submitted(run), known)
    assert found(lines, "convert").state == "done"
    assert found(lines, "curate").state == "ended"  # without its marker
    running = found(lines, "experts", 1)
    assert (running.state, running.restarts, running.loss) == ("running", 2, 2.0)
    assert running.progress == "step 3 of 10, 0.50 s a step"
    assert found(lines, "experts", 0).state == "done"
    waiting = found(lines, "experts", 2)
    assert (waiting.state, waiting.note) == ("waiting", "for other experts (experts_at_once)")
    late = found(lines, "experts", 3)
    assert (late.state, late.bad, late.note) == (
        "time limit",
        True,
        "error: *** JOB 9 CANCELLED DUE TO TIME LIMIT ***",
    )
    assert found(lines, "assemble").note == "for the stage before"
    gone = found(lines, "moe")
    assert (gone.state, gone.note, gone.bad) == (
        "ended",
        "Slurm has forgotten it, and it wrote no log",
        False,
    )


def test_the_later_of_two_jobs_counts(run: Run) -> None:
    record = submitted(run)
    again = SubmittedJob(**{**record.jobs[2].__dict__, "job": "120", "array": "1,3%2"})
    record.jobs.append(again)
    lines = rows(run, record, state("120_1", "RUNNING") | state("103_2", "RUNNING"))
    assert [found(lines, "experts", k).job for k in range(4)] == ["103_0", "120_1", "103_2", "120_3"]


def test_a_failure_that_the_job_wrote_down_goes_first(run: Run) -> None:
    write_log(run, "moe-105.log", LOG)
    failed = state("105", "FAILED", "NonZeroExitCode")
    assert "CUDA out of memory" in found(rows(run, submitted(run), failed), "moe").note
    write_json(
        run.stage_folder("moe") / "failure.json", {"kind": "nan", "sentence": "The loss is no number."}
    )
    assert found(rows(run, submitted(run), failed), "moe").note == "The loss is no number."


@pytest.mark.parametrize("damage", ["{", "[]", '{"kind": "nan"}', '{"kind": "nan", "sentence": 5}', "\udcff"])
def test_a_damaged_failure_file_is_said_in_the_table(
    run: Run, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    write_record(run, submitted(run))
    file = run.stage_folder("moe") / "failure.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(damage, encoding="utf-8", errors="surrogateescape")
    note = found(rows(run, submitted(run), state("105", "FAILED")), "moe").note
    assert str(file) in note
    assert note.endswith("; remove it to go on from the last checkpoint.")


def test_after_a_failure_only_the_failed_job_is_blamed(run: Run) -> None:
    known = state("101", "FAILED") | state("102", "CANCELLED", "DependencyNeverSatisfied")
    lines = rows(run, submitted(run), known)
    assert found(lines, "convert").bad
    assert not found(lines, "curate").bad
    assert found(lines, "curate").note == "a stage before it failed"


def test_table_without_a_controller(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm = make_fake_slurm(tmp_path, monkeypatch)
    slurm.stop_controller()
    write_record(run, submitted(run))
    mark_done(run.stage_folder("convert"))
    show(run.folder, Console(width=160))
    said = capsys.readouterr().out
    assert "Slurm does not answer: slurm_load_jobs error: Unable to contact slurm controller" in said
    assert "convert" in said
    assert "done" in said
    assert "4 unknown" in said


def test_table_names_the_log_of_a_failure(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm = make_fake_slurm(tmp_path, monkeypatch)
    write_record(run, submitted(run))
    slurm.set_job("105", "JobId=105 JobState=FAILED Reason=NonZeroExitCode Restarts=1 ExitCode=1:0")
    log = write_log(run, "moe-105.log", LOG)
    show(run.folder, Console(width=160))
    said = " ".join(capsys.readouterr().out.split())
    assert "moe (failed): OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB" in said
    assert f"Its log is {log}." in said


def test_a_run_on_this_machine_has_no_jobs(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    show(run.folder, Console(width=160))
    assert "not submitted" in capsys.readouterr().out


def test_reason_is_of_the_last_start(tmp_path: Path) -> None:
    file = tmp_path / "x.log"
    file.write_text(LOG)
    assert reason(file) == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    file.write_text(f"{LOG}10:04:00 | moe: job 105 on n1, start 3\nno disk here\n")
    assert reason(file) == "no disk here"
    sentence = "The corpus is too small; add text."
    file.write_text(
        f"{LOG}11:00:00 | curate: job 102 on n1, start 3\nValueError: handled\n{sentence}\n"
        "srun: error: n1: task 0: Exited with exit code 2\n"
    )
    assert reason(file) == sentence
    file.write_text("11:00:00 | moe: job 1 on n1, start 1\n11:01:00 | moe: a/DONE is not visible on n1\n")
    assert reason(file) == "a/DONE is not visible on n1"


def test_a_lost_node_is_told_of_its_own_start(tmp_path: Path) -> None:
    file = tmp_path / "x.log"
    assert not lost_a_node(file, 1)
    lost = "slurmstepd-n1: error: *** JOB 18 ON n1 CANCELLED AT 2026-11-22T10:55:40 DUE TO {} ***\n"
    file.write_text(f"{LOG}{lost.format('JOB REQUEUE')}")
    assert not lost_a_node(file, 2)
    file.write_text(f"{LOG}{lost.format('NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS')}")
    assert [lost_a_node(file, start) for start in (1, 2, 3)] == [False, True, False]
    with file.open("a") as log:
        log.write("10:04:00 | moe: job 105 on n1, start 3\n")
    assert [lost_a_node(file, start) for start in (1, 2, 3)] == [False, True, False]
    text = file.read_text()
    far_from_its_end = "step\n" * TAIL_BYTES
    file.write_text(text.replace("start 2\n", f"start 2\n{far_from_its_end}"))
    assert lost_a_node(file, 2)


def test_unreadable_record(run: Run) -> None:
    file = run.folder / "slurm" / "jobs.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"jobs": [{"stage": "moe"}]}')
    with pytest.raises(L0MoEError, match=r"jobs\.json cannot be read"):
        read_record(run.folder)


def test_one_line_of_scontrol() -> None:
    line = (
        "JobId=14 ArrayJobId=12 ArrayTaskId=1 ArrayTaskThrottle=2 JobName=l0moe toy UserId=root(0) JobState=FAILED "
        "Reason=NonZeroExitCode Dependency=(null) Requeue=1 Restarts=3 BatchFlag=1 ExitCode=1:0 RunTime=00:01:07 "
        "NodeList=n[1-2] StdOut=/a b/c.log"
    )
    job = parse_job(line)["12_1"]
    assert (job.state, job.reason, job.restarts, job.exit_code) == ("FAILED", "NonZeroExitCode", 3, "1:0")
    assert (job.nodes, job.run_time, job.alive) == ("n[1-2]", "00:01:07", False)
    waiting = parse_job("JobId=12 ArrayJobId=12 ArrayTaskId=2-4,7%2 JobState=PENDING Reason=Resources")
    assert sorted(waiting) == ["12_2", "12_3", "12_4", "12_7"]
    assert parse_job("No jobs in the system") == {}


@pytest.mark.parametrize(
    ("text", "tasks"), [("3", [3]), ("0-2,7%2", [0, 1, 2, 7]), ("0-6:2", [0, 2, 4, 6]), ("N/A", [])]
)
def test_task_numbers(text: str, tasks: list[int]) -> None:
    assert parse_array(text) == tasks


def test_only_jobs_that_slurm_knows_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_l0moe.runs import slurm_commands

    slurm: FakeSlurm = make_fake_slurm(tmp_path, monkeypatch)
    slurm.set_job("5", "JobId=5 JobState=RUNNING Reason=None")
    assert set(slurm_commands.states(["4", "5"])) == {"5"}

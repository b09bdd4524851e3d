"""Submitting a chain: what is missing, in order, each after the one before; what sbatch refuses is taken back."""

import json
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm, make_fake_slurm
from toy_recipe import make_run, write_model
from typer.testing import CliRunner

from megatron_l0moe import cli
from megatron_l0moe.chain.slurm.cluster import Cluster
from megatron_l0moe.chain.slurm.submit import Request, cancel_run, submit_chain
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs.stage_folder import begin, finish
from megatron_l0moe.runs.stages import STAGE_NAMES, Run, selection, spec_of, stages

CLUSTER = Cluster(partition="batch", gpus_per_node=0, cpus_per_node=16, experts_at_once=2)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # as if inside of an allocation
    monkeypatch.setenv("SLURM_CONF", "conf")
    return make_fake_slurm(tmp_path, monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "corpus").mkdir()
    return make_run(
        tmp_path, model__path=str(write_model(tmp_path / "model")), data__corpus=str(tmp_path / "corpus")
    )


def submit(
    run: Run, cluster: Cluster = CLUSTER, first: str | None = None, last: str | None = None
) -> list[str]:
    said: list[str] = []
    request = Request(
        run=run, selected=selection("l0moe", first, last), cluster=cluster, cluster_file=Path("cluster.yaml")
    )
    submit_chain(request, said.append)
    return said


def complete(run: Run, name: str, *indices: int) -> None:
    """Leave a stage, or some experts, as if they were done."""
    for k, stage in enumerate(stages(run, name)):
        if not indices or k in indices:
            begin(stage, spec_of(name, "l0moe").restart)
            finish(stage, ["by hand"], {})


def test_the_whole_chain(run: Run, slurm: FakeSlurm) -> None:
    said = submit(run)
    calls = slurm.calls("sbatch")
    assert [Path(call.split()[-1]).stem for call in calls] == list(STAGE_NAMES)
    assert "--dependency" not in calls[0]
    for number, call in enumerate(calls[1:], 101):
        assert f"--dependency=afterok:{number} " in call
    assert "--array=0-3%2" in calls[2]
    jobs = json.loads((run.folder / "slurm" / "jobs.json").read_text())["jobs"]
    assert [(job["stage"], job["job"]) for job in jobs] == [
        (name, str(number)) for number, name in enumerate(STAGE_NAMES, 101)
    ]
    assert jobs[3]["after"] == ["103"]
    assert (
        run.folder / "slurm" / "logs"
    ).is_dir()  # Slurm does not make it, and the job fails without a word
    assert said[2].startswith("experts   job 103 [0-3%2]")


def test_what_an_allocation_has_set_is_not_handed_on(run: Run, slurm: FakeSlurm) -> None:
    submit(run, last="convert")
    names = {line.partition("=")[0] for line in (slurm.folder / "sbatch.env").read_text().splitlines()}
    assert names - {"L0MOE_CPU_FLOPS"} == {"SLURM_CONF"}  # the tests' own, see tests/conftest.py


def test_the_cluster_file_goes_before_the_variables_of_sbatch(
    run: Run, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SBATCH_PARTITION", "SBATCH_ACCOUNT", "SBATCH_TIMELIMIT"):
        monkeypatch.setenv(name, "1")
    said = submit(run, last="convert")
    names = {line.partition("=")[0] for line in (slurm.folder / "sbatch.env").read_text().splitlines()}
    assert names - {"L0MOE_CPU_FLOPS"} == {
        "SLURM_CONF",
        "SBATCH_ACCOUNT",
    }  # the cluster file names no account
    assert said[0] == (
        "Not handed on to sbatch, since the batch scripts go before them: SBATCH_PARTITION, SBATCH_TIMELIMIT."
    )


def test_only_what_is_missing(run: Run, slurm: FakeSlurm) -> None:
    complete(run, "convert")
    complete(run, "curate")
    complete(run, "experts", 0, 2)
    submit(run, last="moe")
    calls = slurm.calls("sbatch")
    assert [Path(call.split()[-1]).stem for call in calls] == ["experts", "assemble", "moe"]
    assert "--array=1,3%2" in calls[0]
    assert "--dependency" not in calls[0]


def test_a_second_time_nothing_is_submitted(run: Run, slurm: FakeSlurm) -> None:
    submit(run)
    assert "is queued already (jobs 101, 102" in submit(run)[0]
    assert len(slurm.calls("sbatch")) == len(STAGE_NAMES)


def test_after_a_failed_expert(run: Run, slurm: FakeSlurm) -> None:
    """Expert 1 failed, 2 runs, 3 waits; assemble and what follows were cancelled by Slurm."""
    submit(run, last="moe")
    complete(run, "convert")
    complete(run, "curate")
    complete(run, "experts", 0)
    slurm.set_job(
        "103",
        "JobId=103 ArrayJobId=103 ArrayTaskId=3 JobState=PENDING Reason=JobArrayTaskLimit Restarts=0",
        "JobId=106 ArrayJobId=103 ArrayTaskId=2 JobState=RUNNING Reason=None Restarts=1 ExitCode=0:0",
        "JobId=105 ArrayJobId=103 ArrayTaskId=1 JobState=FAILED Reason=NonZeroExitCode Restarts=0 ExitCode=1:0",
        "JobId=104 ArrayJobId=103 ArrayTaskId=0 JobState=COMPLETED Reason=None Restarts=0 ExitCode=0:0",
    )
    for number in ("101", "102", "104"):
        slurm.forget(number)
    slurm.set_job("105", "JobId=105 JobState=CANCELLED Reason=DependencyNeverSatisfied Restarts=0")
    submit(run, last="moe")
    calls = slurm.calls("sbatch")[5:]
    assert [Path(call.split()[-1]).stem for call in calls] == ["experts", "assemble", "moe"]
    assert "--array=1%2" in calls[0]
    assert "--dependency=afterok:103_2:103_3:106 " in calls[1]


def test_jobs_that_wait_for_one_that_is_made_anew_are_replaced(run: Run, slurm: FakeSlurm) -> None:
    submit(run)
    slurm.set_job("101", "JobId=101 JobState=FAILED Reason=NonZeroExitCode Restarts=0")
    submit(run)
    assert slurm.calls("scancel") == ["102 103_0 103_1 103_2 103_3 104 105 106 107 108"]
    assert len(slurm.calls("sbatch")) == 2 * len(STAGE_NAMES)


def test_a_running_job_is_never_replaced(run: Run, slurm: FakeSlurm) -> None:
    submit(run)
    slurm.set_job("101", "JobId=101 JobState=FAILED Reason=NonZeroExitCode Restarts=0")
    slurm.set_job("102", "JobId=102 JobState=RUNNING Reason=None Restarts=0")
    with pytest.raises(L0MoEError, match=r"Job 102 of stage curate is RUNNING although a stage before"):
        submit(run)
    assert not slurm.calls("scancel")


def test_sbatchs_own_words(run: Run, slurm: FakeSlurm) -> None:
    words = "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified"
    slurm.refuse("convert", words)
    with pytest.raises(L0MoEError, match=r"Batch job submission failed: Invalid account") as caught:
        submit(run)
    assert "\n" not in str(caught.value)
    assert not slurm.calls("sbatch")


def test_a_later_stage_is_refused_before_anything_is_queued(run: Run, slurm: FakeSlurm) -> None:
    slurm.refuse("moe", "sbatch: error: Memory specification can not be satisfied")
    with pytest.raises(L0MoEError, match=r"sbatch refused .*moe\.sbatch: Memory specification") as caught:
        submit(run)
    assert "\n" not in str(caught.value)
    asked = [Path(call.split()[-1]).stem for call in slurm.calls("test_only")]
    assert asked == list(STAGE_NAMES[: STAGE_NAMES.index("moe") + 1])
    assert "--array=0-3%2" in slurm.calls("test_only")[2]
    assert not slurm.calls("sbatch")
    assert not (run.folder / "slurm" / "jobs.json").exists()


def test_waiting_jobs_are_not_replaced_when_a_new_one_is_refused(run: Run, slurm: FakeSlurm) -> None:
    submit(run)
    slurm.set_job("101", "JobId=101 JobState=FAILED Reason=NonZeroExitCode Restarts=0")
    slurm.refuse("report", "sbatch: error: invalid partition specified: nosuch")
    with pytest.raises(L0MoEError, match=r"invalid partition specified: nosuch"):
        submit(run)
    assert not slurm.calls("scancel")
    assert len(slurm.calls("sbatch")) == len(STAGE_NAMES)


def test_what_only_cannot_begin_now_is_queued(run: Run, slurm: FakeSlurm) -> None:
    """With --test-only sbatch says the same of nodes that are down as of nodes that are too small."""
    words = "allocation failure: Requested node configuration is not available"
    slurm.refuse("experts", words, submitted=False)
    submit(run)
    tried, *calls = slurm.calls("sbatch")
    assert "--array=0-3%2 --begin=now+1day" in tried
    assert slurm.calls("scancel") == [tried.split()[0]]
    assert [Path(call.split()[-1]).stem for call in calls] == list(STAGE_NAMES)
    assert not any("--begin" in call for call in calls)


def test_what_was_queued_before_a_refusal_that_comes_late_is_cancelled(run: Run, slurm: FakeSlurm) -> None:
    slurm.refuse("assemble", "sbatch: error: invalid partition specified: nosuch", asked=False)
    with pytest.raises(L0MoEError) as caught:
        submit(run)
    assert str(caught.value).endswith(
        "invalid partition specified: nosuch; the jobs queued before it (convert 101, curate 102, experts 103) were "
        "cancelled."
    )
    assert slurm.calls("scancel") == ["103 102 101"]
    record = json.loads((run.folder / "slurm" / "jobs.json").read_text())
    assert record["cancelled"] == ["103", "102", "101"]


def test_from_a_stage_whose_inputs_are_queued(run: Run, slurm: FakeSlurm) -> None:
    submit(run, last="experts")
    submit(run, first="assemble", last="assemble")
    assert "--dependency=afterok:101:102:103_0:103_1:103_2:103_3 " in slurm.calls("sbatch")[-1]


def test_from_a_stage_whose_inputs_are_nowhere(run: Run, slurm: FakeSlurm) -> None:
    with pytest.raises(
        L0MoEError, match=r"The stage assemble needs convert, which is neither done nor queued"
    ):
        submit(run, first="assemble")


def test_a_folder_of_another_recipe(run: Run, slurm: FakeSlurm, tmp_path: Path) -> None:
    complete(run, "convert")
    complete(run, "curate")
    other = Run(
        recipe=run.recipe.model_copy(update={"seed": 5}), recipe_file=run.recipe_file, runs_dir=run.runs_dir
    )
    with pytest.raises(L0MoEError, match=r"was made with other settings"):
        submit(other)
    assert not slurm.calls("sbatch")


def test_more_gpus_than_a_node_has(tmp_path: Path, slurm: FakeSlurm) -> None:
    (tmp_path / "corpus").mkdir()
    run = make_run(
        tmp_path,
        model__path=str(write_model(tmp_path / "model")),
        data__corpus=str(tmp_path / "corpus"),
        moe_training__parallel={"processes": 8, "nodes": 1, "expert": 4},
        moe_training__sequences_per_domain=2,
        data__tokens_per_set=2560,
    )
    cluster = Cluster(gpus_per_node=4, cpus_per_node=16)
    with pytest.raises(
        L0MoEError, match=r"8 on each, and gpus_per_node is 4; set moe_training.parallel.nodes to 2"
    ):
        submit(run, cluster)
    assert not slurm.calls("sbatch")


def test_without_slurm(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(L0MoEError, match=r"There is no command sbatch on this machine"):
        submit(run)


def test_cancel(run: Run, slurm: FakeSlurm) -> None:
    submit(run)
    slurm.set_job("101", "JobId=101 JobState=COMPLETED Reason=None Restarts=0")
    assert cancel_run(run.folder) == [str(number) for number in range(102, 109)]
    assert slurm.calls("scancel") == ["108 107 106 105 104 103 102"]
    assert cancel_run(run.folder) == []


def test_unfinished_work_of_another_recipe(run: Run, slurm: FakeSlurm) -> None:
    complete(run, "convert")
    complete(run, "curate")
    begin(stages(run, "experts")[2], "resume")
    training = run.recipe.expert_training.model_copy(update={"learning_rate": 0.5})
    recipe = run.recipe.model_copy(update={"expert_training": training})
    other = Run(recipe=recipe, recipe_file=run.recipe_file, runs_dir=run.runs_dir)
    with pytest.raises(L0MoEError, match=r"experts/002 holds unfinished work that was started with other"):
        submit(other)
    assert not slurm.calls("sbatch")
    submit(run)


def test_no_run_on_this_machine_beside_queued_jobs(run: Run, slurm: FakeSlurm) -> None:
    submit(run)
    command = ["run", str(run.recipe_file), "--runs-dir", str(run.runs_dir)]
    refused = CliRunner().invoke(cli.app, command)
    assert refused.exit_code == 2
    assert "The run toy is queued on Slurm (jobs 101, 102" in refused.stderr
    cancel_run(run.folder)
    assert "queued on Slurm" not in CliRunner().invoke(cli.app, [*command, "--until", "convert"]).stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--launcher", "slrum"], "There is no launcher 'slrum' (did you mean 'slurm'?)"),
        (["--launcher", "slurm"], "--launcher slurm needs --cluster FILE"),
        (["--cluster", "x.yaml"], "--cluster x.yaml means nothing without --launcher slurm"),
        (["--launcher", "slurm", "--cluster", "x.yaml"], "Cluster file x.yaml does not exist"),
    ],
)
def test_options(run: Run, words: list[str], sentence: str) -> None:
    done = CliRunner().invoke(cli.app, ["run", str(run.recipe_file), *words])
    assert done.exit_code == 2
    assert sentence in done.stderr


def test_no_such_run(run: Run, slurm: FakeSlurm) -> None:
    submit(run)
    for command in ("status", "cancel"):
        done = CliRunner().invoke(cli.app, [command, "toi", "--runs-dir", str(run.runs_dir)])
        assert done.exit_code == 2
        assert "There is no run 'toi'" in done.stderr
        assert "(did you mean 'toy'?)" in done.stderr

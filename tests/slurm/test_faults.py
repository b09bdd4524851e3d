"""What happens to training jobs on a cluster, each for real: they go on to the same end, or stop and say why.

A job is held at a step by SIGSTOP of its processes until the fault has had its effect, so its steps need not be slow.
What it ends with is compared with the undisturbed run's, bit for bit. Faults that do not touch other jobs are made
while those run.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from processes import alive
from slurm.cluster import Cluster
from slurm.world import (
    EXPERT_SAVE_INTERVAL,
    MOE_SAVE_INTERVAL,
    MOE_STEPS,
    SlurmRun,
    copy_run,
    metrics,
    weights,
)

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

BEFORE_MOE = ("convert", "curate", "experts", "assemble")
HELD_STEP = MOE_SAVE_INTERVAL + 2
"""After a checkpoint and before the next one, so that there is something to lose."""
HUGE_LEARNING_RATE = 1e30
TIMES = frozenset({"seconds", "tokens_per_second", "mfu"})
"""Numbers in metrics.jsonl that no two runs have in common."""
MoE = Callable[..., SlurmRun]


@pytest.fixture(scope="module")
def moe(chain: SlurmRun, tmp_path_factory: pytest.TempPathFactory) -> MoE:
    """Return a function that submits the MoE stage of a copy of the run, and returns the copy."""
    folder = tmp_path_factory.mktemp("faults")

    def submit(name: str, recipe_changes: dict[str, Any] | None = None, **cluster_changes: Any) -> SlurmRun:
        run = copy_run(chain, folder / name, *BEFORE_MOE, recipe_changes=recipe_changes, **cluster_changes)
        run.submit("--from", "moe", "--until", "moe")
        return run

    return submit


@pytest.fixture(scope="module")
def disturbed(moe: MoE, chain: SlurmRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SlurmRun]:
    """Four runs at once: one meets its time limit, one loses a worker, one gets NaN, one cannot save.

    While the first runs, the controller is killed and started again.
    """
    cluster = chain.cluster
    runs = {"limit": moe("limit", stages={"moe": {"time": "00:03:00", "memory": "8G"}})}
    held = hold(runs["limit"])
    # Before the others begin: a controller that never wrote down their start would begin them again.
    cluster.wait_for_saved_state(runs["limit"].jobs()["moe"])
    cluster.kill_controller()
    cluster.start_controller()
    runs["killed"] = moe("killed")
    victims = hold(runs["killed"])
    victims[-1].kill()
    go_on(victims[:-1])
    runs["nan"] = moe("nan", {"moe_training": {"learning_rate": HUGE_LEARNING_RATE}})
    runs["unsaved"] = expert_that_cannot_save(chain, tmp_path_factory.mktemp("unsaved"))
    cluster.wait_until(lambda: "got USR1" in runs["limit"].logs(), 150, runs["limit"].logs)
    # On a busy machine the second start would meet the limit too, which is right, and takes its time.
    cluster.run("scontrol", "update", f"jobid={runs['limit'].jobs()['moe']}", "timelimit=10")
    go_on(held)
    return runs


def expert_that_cannot_save(chain: SlurmRun, folder: Path) -> SlurmRun:
    """Submit all from the experts on; something lies where the first checkpoint of expert 1 has to go."""
    run = copy_run(chain, folder, "convert", "curate", experts_at_once=2)
    run.submit("--from", "experts")
    begun = run.folder / "experts" / "001" / "attempts.jsonl"
    run.cluster.wait_until(begun.is_file, 120, run.logs)
    checkpoints = begun.with_name("checkpoints")
    checkpoints.mkdir(exist_ok=True)
    (checkpoints / f"iter_{EXPERT_SAVE_INTERVAL:07d}").touch()
    return run


def hold(run: SlurmRun) -> list[psutil.Process]:
    """Stop the training processes, rank 0 first, once a step is done; returns them."""
    folder = run.folder / "moe"
    run.wait_for_step(HELD_STEP, folder)
    workers = run.workers(folder)
    for worker in workers:
        worker.suspend()
    assert len(workers) == 2, run.logs()
    assert metrics(folder)[-1]["iteration"] < 2 * MOE_SAVE_INTERVAL, "held too late"
    return workers


def go_on(workers: list[psutil.Process]) -> None:
    for worker in workers:
        worker.resume()


def attempts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "attempts.jsonl").read_text(encoding="utf-8").splitlines()]


def difference(one: SlurmRun, other: SlurmRun) -> str | None:
    """Say what differs between the loss curves and final weights of two MoE trainings; None: nothing."""
    if curve(one) != curve(other):
        return "metrics"
    mine, theirs = (weights(run.folder / "moe" / "checkpoints") for run in (one, other))
    if set(mine) != set(theirs):
        return "names"
    return next((name for name in mine if not torch.equal(mine[name], theirs[name])), None)


def curve(run: SlurmRun) -> list[dict[str, Any]]:
    return [{key: row[key] for key in row if key not in TIMES} for row in metrics(run.folder / "moe")]


def assert_same_end(run: SlurmRun, chain: SlurmRun, *, how: str, saves: bool, false_starts: int = 0) -> None:
    """The job was queued again, after a first attempt that ended like this, and came to the undisturbed end.

    It was so once, or with `false_starts` up to so many times more, for attempts that ended before their first step.
    """
    record = run.wait("moe")
    first, *false, last = attempts(run.folder / "moe")
    assert len(false) <= false_starts, run.logs()
    assert all(attempt["last_step"] == attempt["start_step"] == last["start_step"] for attempt in false)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", str(1 + len(false))), run.logs()
    assert (first["how"], last["how"]) == (how, "finished")
    judged = how in ("stopped", "crashed")  # a last phase could run
    assert (first["verdict"], last["verdict"]) == ("again" if judged else "", "done")
    if saves:
        assert last["start_step"] == first["last_step"] >= HELD_STEP
    else:
        assert last["start_step"] == MOE_SAVE_INTERVAL < first["last_step"]
    assert (run.folder / "moe" / "DONE").is_file()
    assert difference(run, chain) is None


def test_time_limit(disturbed: dict[str, SlurmRun], chain: SlurmRun) -> None:
    """Also with a controller that was away for a moment."""
    assert_same_end(disturbed["limit"], chain, how="stopped", saves=True)


def test_killed_worker(disturbed: dict[str, SlurmRun], chain: SlurmRun) -> None:
    assert_same_end(disturbed["killed"], chain, how="crashed", saves=False)


def test_nan_stops_with_step_and_samples(disturbed: dict[str, SlurmRun]) -> None:
    run = disturbed["nan"]
    record = run.wait("moe")
    assert (record["JobState"], record["Restarts"]) == ("FAILED", "0"), run.logs()
    (attempt,) = attempts(run.folder / "moe")
    assert (attempt["how"], attempt["verdict"]) == ("failed", "stop")
    failure = json.loads((run.folder / "moe" / "failure.json").read_text(encoding="utf-8"))
    assert failure["kind"] == "nan"
    assert failure["samples"]
    assert f"Training stopped in step {failure['step']} of {MOE_STEPS}, because " in run.logs()
    assert not (run.folder / "moe" / "DONE").exists()


def test_a_repeated_crash_stops_the_expert_and_the_rest(disturbed: dict[str, SlurmRun]) -> None:
    run = disturbed["unsaved"]
    for stage in ("report", "experts"):
        run.wait(stage)
    states = [record["JobState"] for record in run.cluster.jobs(run.jobs()["experts"])]
    assert sorted(states) == ["COMPLETED", "FAILED"], run.logs()
    first, second = attempts(run.folder / "experts" / "001")
    assert first["how"] == second["how"] == "crashed"
    assert first["last_step"] == second["last_step"]
    assert f"crashed while saving after step {first['last_step']} in 2 attempts in a row" in run.logs()
    for stage in ("assemble", "moe", "export", "evaluate", "report"):
        (record,) = run.cluster.jobs(run.jobs()[stage])
        assert (record["JobState"], record["Reason"]) == ("CANCELLED", "DependencyNeverSatisfied"), stage
    assert (run.folder / "experts" / "000" / "DONE").is_file()
    status = run.l0moe("status", str(run.folder))
    log = run.folder / "slurm" / "logs" / f"experts-{run.jobs()['experts']}_1.log"
    assert "1 done, 1 failed" in status
    assert f"crashed while saving after step {first['last_step']}" in status.replace("\n", " ")
    assert f"Its log is {log}." in status.replace("\n", "")


def test_preemption(moe: MoE, chain: SlurmRun, cluster: Cluster) -> None:
    """A more urgent job takes all nodes; the one that they are taken from saves in its grace time."""
    run = moe("preempted")
    held = hold(run)
    urgent = cluster.submit("--partition=urgent", "--nodes=3", "--exclusive", script="echo urgent")
    cluster.wait_until(lambda: "training saves and ends" in run.logs(), 60, run.logs)
    go_on(held)
    assert cluster.wait_for_job(urgent)[0]["JobState"] == "COMPLETED"
    assert_same_end(run, chain, how="stopped", saves=True)


def test_a_crashed_node_and_a_cut_network(moe: MoE, chain: SlurmRun, cluster: Cluster) -> None:
    """One job loses its first node, where its batch script runs, the other one the network of its second node."""
    crashed = moe("crashed", sbatch={"nodelist": "n1,n2"})
    hold(crashed)
    cut = moe("cut", sbatch={"nodelist": "n2,n3"})
    hold(cut)
    pids = [process.pid for process in cluster.machines["n1"].processes()]
    assert len(pids) > 5
    cluster.crash_node("n1")
    assert not any(alive(pid) for pid in pids)
    cluster.cut_network("n3")
    try:
        for node in ("n1", "n3"):
            cluster.wait_for_dead_node(node)
        assert cluster.machines["n3"].running
        assert "down" not in cluster.node_state("n2")
    finally:
        cluster.start_node("n1")
        cluster.restore_network("n3")
    assert_same_end(crashed, chain, how="vanished", saves=False)
    # Its batch script lives and is told to end, when there is nobody left to save with. Slurm ends what it finds of the
    # job on the node that is back, which may be the new start already.
    assert_same_end(cut, chain, how="vanished", saves=False, false_starts=1)
    assert attempts(cut.folder / "moe")[0]["reason"].startswith("Slurm lost one of its nodes")


def test_a_difference_would_be_seen(chain: SlurmRun, tmp_path: Path) -> None:
    """Control: one weight of one file, and one loss."""
    for name, change in (("metrics", one_loss), ("weights", one_checkpoint_earlier)):
        run = copy_run(chain, tmp_path / name, "moe")
        assert difference(run, chain) is None
        change(run.folder / "moe")
        assert difference(run, chain) is not None


def one_loss(folder: Path) -> None:
    rows = metrics(folder)
    rows[MOE_STEPS // 2]["lm_loss"] += 1e-6
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def one_checkpoint_earlier(folder: Path) -> None:
    note = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    note.write_text(str(MOE_STEPS - MOE_SAVE_INTERVAL), encoding="utf-8")

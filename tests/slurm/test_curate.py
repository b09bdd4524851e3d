"""curate's tasks as job arrays of a real Slurm: the same bytes, also after a task was killed."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from curate_worlds import checksums
from slurm.cluster import Cluster
from whole_chain import toy_world

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

PROGRAM = Path(__file__).with_name("curate_in_small_units.py")
EXECUTOR = {
    "kind": "slurm", "workers": 2, "tasks": 2, "mem_per_cpu_gb": 1,
    "slurm": {"partition": "batch", "time": "00:10:00"},
}  # fmt: skip


def test_a_killed_task_and_the_same_bytes(cluster: Cluster, tmp_path: Path) -> None:
    """The driver is a job itself; one that asks for memory by node, where its tasks ask by CPU."""
    recipe = toy_world.make_world(tmp_path / "world")
    command = [sys.executable, str(PROGRAM), str(recipe), str(tmp_path / "expected")]
    subprocess.run(command, check=True, capture_output=True, env=toy_world.environment())
    expected = checksums(tmp_path / "expected")

    recipe = toy_world.change_recipe(recipe, tmp_path / "slurm.yaml", "data", executor=EXECUTOR)
    out = tmp_path / "out"
    drive = f"exec {sys.executable} {PROGRAM} {recipe} {out}"
    first = cluster.submit("--mem=3000", script=drive, OMP_NUM_THREADS="1")
    kill_a_task(cluster)
    (record,) = cluster.wait_for_job(first, timeout=120)
    assert record["JobState"] == "FAILED"
    assert "ended with 1 of 2 task(s) of scan not done" in cluster.log(first)
    assert not cluster.run("squeue", "--noheader").stdout  # nothing waits for what will not come

    second = cluster.submit("--mem=3000", script=drive, OMP_NUM_THREADS="1")
    (record,) = cluster.wait_for_job(second, timeout=180)
    assert record["JobState"] == "COMPLETED", cluster.log(second)
    assert "scanned documents: 1 of 2 units were done before" in cluster.log(second)
    assert checksums(out) == expected
    assert [len(list((out / "work" / step).rglob("[0-9]*.npy"))) for step in ("scan", "tokenise")] == [2, 4]


def kill_a_task(cluster: Cluster) -> None:
    """Kill the first process of the step that runs, while it still imports: it has done nothing yet."""
    found: list[psutil.Process] = []

    def first() -> bool:
        found.extend(cluster.processes("bin/python", "executor.pik"))
        return bool(found)

    cluster.wait_until(first, 120, lambda: "no task of curate runs")
    found[0].kill()

"""The test cluster is a real Slurm: what launchers rely on works, what can break does break, nothing stays."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from processes import alive, wait_until
from slurm.cluster import Cluster
from slurm.packages import Programs

pytestmark = pytest.mark.slurm

ALL_REDUCE = """\
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
print(f"rank {dist.get_rank()} on {os.uname().nodename}: {total.item()}", flush=True)
dist.destroy_process_group()
"""


def test_nodes_and_jobs(cluster: Cluster) -> None:
    job = cluster.submit("--nodes=3", script="srun hostname | sort; env | grep -c LD_LIBRARY_PATH")
    (record,) = cluster.wait_for_job(job)
    # The last command of the script found nothing, and that is the job's exit code: jobs do fail here.
    assert (record["JobState"], record["ExitCode"]) == ("FAILED", "1:0")
    assert cluster.log(job).split() == ["n1", "n2", "n3", "0"]


def test_gpus_are_counted(cluster: Cluster) -> None:
    done = cluster.run("srun", "--nodes=2", "--gpus-per-node=2", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES")
    assert done.stdout.split() == ["0,1", "0,1"]
    refused = cluster.run("sbatch", "--gpus-per-node=5", "--wrap=true", check=False)
    assert "Requested node configuration is not available" in refused.stderr


def test_array_has_a_cap(cluster: Cluster, tmp_path: Path) -> None:
    """Each task counts those that run beside it."""
    script = "touch $SLURM_ARRAY_TASK_ID; ls | wc -l; sleep 1; rm $SLURM_ARRAY_TASK_ID"
    job = cluster.submit("--array=0-4%2", f"--chdir={tmp_path}", script=script)
    records = cluster.wait_for_job(job)
    assert {record["JobState"] for record in records} == {"COMPLETED"}
    beside = [int(cluster.log(f"{job}_{index}")) for index in range(5)]
    assert max(beside) == 2


def test_dependencies(cluster: Cluster) -> None:
    good = cluster.submit("--array=0-1", "--wrap=true")
    bad = cluster.submit("--array=0-1", script="exit $SLURM_ARRAY_TASK_ID")
    after_good = cluster.submit(f"--dependency=afterok:{good}", "--wrap=true")
    after_bad = cluster.submit(f"--dependency=afterok:{bad}", "--kill-on-invalid-dep=yes", "--wrap=true")
    assert cluster.wait_for_job(after_good)[0]["JobState"] == "COMPLETED"
    (record,) = cluster.wait_for_job(after_bad)
    assert (record["JobState"], record["Reason"]) == ("CANCELLED", "DependencyNeverSatisfied")


def test_requeue(cluster: Cluster) -> None:
    job = cluster.submit(
        "--requeue",
        script="echo restart ${SLURM_RESTART_COUNT:-0}\n"
        'if [ -z "$SLURM_RESTART_COUNT" ]; then scontrol requeue $SLURM_JOB_ID; sleep 60; fi',
    )
    (record,) = cluster.wait_for_job(job)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "1")
    assert [line for line in cluster.log(job).splitlines() if "restart" in line] == ["restart 0", "restart 1"]


def test_two_nodes_sum_over_gloo(cluster: Cluster, tmp_path: Path) -> None:
    program = tmp_path / "all_reduce.py"
    program.write_text(ALL_REDUCE, encoding="utf-8")
    torchrun = f"{sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 1"
    job = cluster.submit(
        "--nodes=2",
        script=f"srun bash -c '{torchrun} --node-rank $SLURM_NODEID --master-addr n1 {program}'",
        OMP_NUM_THREADS="1",
    )
    (record,) = cluster.wait_for_job(job, timeout=120)
    assert record["NodeList"] == "n[1-2]"
    assert record["JobState"] == "COMPLETED", cluster.log(job)
    assert {"rank 0 on n1: 3.0", "rank 1 on n2: 3.0"} <= set(cluster.log(job).splitlines())


def test_the_controller_is_killed_and_started(cluster: Cluster) -> None:
    job = cluster.submit(script="sleep 12")
    cluster.wait_for_job(job, "RUNNING")
    cluster.wait_for_saved_state(job)
    cluster.kill_controller()
    assert "DOWN" in cluster.run("scontrol", "ping", check=False).stdout
    cluster.start_controller()
    (record,) = cluster.wait_for_job(job)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "0")


def test_an_account_is_refused(cluster: Cluster) -> None:
    refused = cluster.run("sbatch", "--account=bankrupt", "--wrap=true", check=False)
    assert "Invalid account or account/partition combination specified" in refused.stderr


SMALL_CLUSTER = """\
import time
from pathlib import Path
from slurm.cluster import Cluster
from slurm.packages import fetch

def test_that_fails(tmp_path):
    with Cluster(Path({folder!r}), fetch(), nodes=1) as cluster:
        cluster.wait_for_job(cluster.submit(script="sleep 600"), "RUNNING")
        while not Path({end!r}).exists():
            time.sleep(0.1)
        assert False
"""


@pytest.mark.parametrize("killed", [False, True], ids=["failed test", "killed session"])
def test_nothing_is_left(programs: Programs, tmp_path: Path, killed: bool) -> None:
    """Another test session, which fails or gets SIGKILL, leaves no process, mount or interface."""
    folder, end, file = tmp_path / "c", tmp_path / "end", tmp_path / "test_one.py"
    file.write_text(SMALL_CLUSTER.format(folder=str(folder), end=str(end)), encoding="utf-8")
    before = machine_state()
    session = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", file],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: any("sleep 600" in line for line in processes_of(folder).values()))
        started = processes_of(folder)
        for name in ("slurmctld", "slurmd", "slurmstepd", "munged"):
            assert any(name in line for line in started.values()), started
        if killed:
            session.kill()
        else:
            end.touch()
        assert session.wait(60) == (-signal.SIGKILL if killed else 1)
    finally:
        session.kill()
    wait_until(lambda: not any(alive(pid) for pid in started))
    assert not processes_of(folder)
    assert machine_state() == before


def processes_of(folder: Path) -> dict[int, str]:
    """Return the command lines of the processes that have a cluster's folder in theirs or in the environment."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if str(folder) in line or any(str(folder) in value for value in process.environ().values()):
                found[process.pid] = line
    return found


def machine_state() -> tuple[list[str], list[str]]:
    """Return the real machine's mounts and network interfaces."""
    mounts = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    return mounts, sorted(os.listdir("/sys/class/net"))

"""What a user sees of the queue: a refusal in sbatch's own words, two commands at once, cancel and a rerun."""

import subprocess
import sys
from pathlib import Path

import pytest
from slurm.cluster import Cluster
from slurm.configuration import REFUSED_ACCOUNT
from slurm.world import SlurmRun, copy_run, make_world

from megatron_l0moe.runs import slurm_commands

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

STAGES = 8
REFUSED = {("FAILED", "BadConstraints")}
"""What Slurm itself notes of a script that it refused, when a node cannot hold it; otherwise it notes nothing."""


@pytest.fixture(scope="module")
def world(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> SlurmRun:
    """A run of which nothing is done."""
    return make_world(cluster, tmp_path_factory.mktemp("world"))


def queued(cluster: Cluster) -> list[str]:
    return cluster.run("squeue", "--noheader", "--format=%i %j").stdout.splitlines()


def known(run: SlurmRun) -> set[tuple[str, str]]:
    """Return state and reason of all jobs of a run; the controller remembers those that were cancelled too."""
    shown = run.cluster.run("scontrol", "--oneliner", "show", "job", check=False).stdout
    jobs = [slurm_commands.parse_job(line) for line in shown.splitlines() if str(run.folder) in line]
    return {(job.state, job.reason) for found in jobs for job in found.values()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"account": REFUSED_ACCOUNT}, "Invalid account or account/partition combination specified"),
        ({"partition": "nosuch"}, "invalid partition specified: nosuch"),
        ({"stages": {"moe": {"memory": "900G"}}}, "Memory specification can not be satisfied"),
        (
            {"stages": {"report": {"account": REFUSED_ACCOUNT}}},
            "Invalid account or account/partition combination specified",
        ),
    ],
    ids=["account", "partition", "memory of a later stage", "account of the last stage"],
)
def test_a_refusal_comes_in_sbatchs_words_before_anything_is_queued(
    world: SlurmRun, tmp_path: Path, change: dict, words: str
) -> None:
    run = copy_run(world, tmp_path, **change)
    said = run.submit(check=False)
    assert words in said, said
    assert "Traceback" not in said
    assert known(run) <= REFUSED


def test_what_only_cannot_begin_now_is_queued(world: SlurmRun, tmp_path: Path) -> None:
    """Training takes two nodes, and only one is up."""
    run = copy_run(world, tmp_path, sbatch={"hold": True})
    try:
        world.cluster.run("scontrol", "update", "nodename=n2,n3", "state=drain", "reason=test")
        run.submit()
    finally:
        world.cluster.run("scontrol", "update", "nodename=n2,n3", "state=resume")
    assert len(queued(run.cluster)) == STAGES
    states = {state for state, _ in known(run)}
    assert states == {"PENDING", "CANCELLED"}  # cancelled: what was tried
    run.l0moe("cancel", str(run.folder))


def test_two_commands_at_once_submit_one_chain(world: SlurmRun, tmp_path: Path) -> None:
    run = copy_run(world, tmp_path, sbatch={"hold": True})
    words = ("-m", "megatron_l0moe", "run", str(run.recipe), "--runs-dir", str(run.runs))
    slurm = ("--launcher", "slurm", "--cluster", str(run.cluster_file))
    both = [
        subprocess.Popen(
            run.cluster.head.inside([sys.executable, *words, *slurm], Path.cwd()),
            env=run.cluster.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    said = sorted((command.communicate(timeout=120)[0] for command in both), key=len)
    assert len(queued(run.cluster)) == STAGES
    assert {state for state, _ in known(run)} == {"PENDING"}
    assert "Traceback" not in "".join(said)
    assert sum("report    job" in text for text in said) == 1, said

    assert "nothing was submitted" in run.submit()
    assert run.l0moe("cancel", str(run.folder)).startswith("Cancelled: ")
    assert not queued(run.cluster)
    assert f"No job of {run.folder} waits or runs." in run.l0moe("cancel", str(run.folder))

    run.submit()
    assert len(queued(run.cluster)) == STAGES
    run.l0moe("cancel", str(run.folder))

"""One test cluster for all tests here."""

from collections.abc import Iterator

import pytest
from slurm.cluster import Cluster
from slurm.machines import check_namespaces
from slurm.packages import Programs, UnavailableError, fetch
from slurm.world import SlurmRun, make_world

CHAIN_SECONDS = 900.0
"""Patience for the whole chain, which takes some two minutes on two free cores."""


@pytest.fixture(scope="session")
def programs() -> Programs:
    """Slurm's programs, where this machine can run them."""
    try:
        check_namespaces()
        return fetch()
    except UnavailableError as reason:
        pytest.skip(f"no test cluster: {reason}")


@pytest.fixture(scope="session")
def cluster(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running cluster of three nodes."""
    with Cluster(tmp_path_factory.mktemp("slurm"), programs) as started:
        yield started


@pytest.fixture(scope="session")
def chain(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> SlurmRun:
    """The whole chain, done undisturbed as jobs; what is disturbed is compared with it."""
    run = make_world(cluster, tmp_path_factory.mktemp("chain"))
    run.submit()
    record = run.wait("report", timeout=CHAIN_SECONDS)
    assert record["JobState"] == "COMPLETED", run.logs()
    return run


@pytest.fixture(scope="module", autouse=True)
def nothing_queued(cluster: Cluster) -> Iterator[None]:
    """End what a failed test has left in the queue, so that the next file's tests find it empty."""
    yield
    cluster.run("scancel", "--user=root")
    cluster.wait_until(lambda: not cluster.run("squeue", "--noheader").stdout, 120, lambda: "jobs do not end")

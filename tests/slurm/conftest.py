"""One test cluster for all tests here."""

from collections.abc import Iterator

import pytest
from slurm.cluster import Cluster
from slurm.machines import check_namespaces
from slurm.packages import Programs, UnavailableError, fetch


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

"""The cluster file: the examples, and one sentence for what is wrong."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_l0moe.chain.slurm.cluster import load_cluster, time_seconds
from megatron_l0moe.errors import L0MoEError

EXAMPLES = sorted((Path(__file__).parents[3] / "slurm" / "clusters").glob("*.yaml"))
MINIMAL: dict[str, Any] = {"gpus_per_node": 8, "cpus_per_node": 96}


def write(folder: Path, **changes: Any) -> Path:
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(MINIMAL | changes), encoding="utf-8")
    return file


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_examples(file: Path) -> None:
    cluster = load_cluster(file)
    assert cluster.partition
    assert file.read_text(encoding="utf-8").count("#") >= 3


def test_there_are_three_examples() -> None:
    found = {file.stem: load_cluster(file) for file in EXAMPLES}
    assert set(found) == {"plain", "pyxis_infiniband", "small_cpu"}
    assert found["pyxis_infiniband"].container
    assert "NCCL_IB_HCA" in found["pyxis_infiniband"].environment
    assert found["small_cpu"].gpus_per_node == 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"partitoin": "gpu"}, r"unknown key 'partitoin' \(did you mean 'partition'\?\)"),
        (
            {"stages": {"moe": {"tiem": "1:00:00"}}},
            r"unknown key 'stages.moe.tiem' \(did you mean 'time'\?\)",
        ),
        ({"stages": {"asemble": {}}}, r"unknown key 'stages.asemble' \(did you mean 'assemble'\?\)"),
        (
            {"container": {"image": "x", "mount": []}},
            r"unknown key 'container.mount' \(did you mean 'mounts'\?\)",
        ),
        ({"stages": {"moe": {"time": 86400}}}, r'a time must be text; put it in quotes, "24:00:00"'),
        ({"stages": {"moe": {"time": "1 day"}}}, r'written as "HOURS:MINUTES:SECONDS"'),
        (
            {"stages": {"moe": {"time": "00:05:00"}}},
            r"stages.moe.time must be at least a minute longer than signal",
        ),
        ({"stages": {"moe": {"gpus": 4}}}, r"stages.moe.gpus follows from the recipe's layout"),
        ({"stages": {"evaluate": {"gpus": 9}}}, r"stages.evaluate.gpus \(9\) must be at most gpus_per_node"),
        ({"memory_per_node": 480}, r'memory must be text such as "480G"'),
        ({"environment": {"NCCL_IB_TIMEOUT": 22}}, r'value of NCCL_IB_TIMEOUT must be text; .*"22"'),
        ({"environment": {"A B": "1"}}, r"'A B' is no name of an environment variable"),
        ({"sbatch": {"nodes": 4}}, r"option 'nodes' has a key of its own: the recipe's parallel sections"),
        ({"sbatch": {"output": "x"}}, r"option 'output' is set by l0moe"),
        ({"sbatch": {"--mail-type": "END"}}, r"option '--mail-type' must be written as 'mail-type'"),
        ({"sbatch": {"overcommit": False}}, r"option 'overcommit' is false"),
        ({"gpus_per_node": None}, r"gpus_per_node"),
        ({"gpu": "h1000"}, r"gpu"),
    ],
)
def test_broken_rule(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(L0MoEError, match=sentence) as caught:
        load_cluster(write(tmp_path, **changes))
    assert str(caught.value).startswith(f"Cluster file {tmp_path / 'cluster.yaml'}: ")
    assert "\n" not in str(caught.value)


def test_unquoted_time_is_explained(tmp_path: Path) -> None:
    """YAML reads 24:00:00 as a number in base 60."""
    file = tmp_path / "cluster.yaml"
    file.write_text("gpus_per_node: 8\ncpus_per_node: 96\nstages: {moe: {time: 24:00:00}}\n")
    with pytest.raises(L0MoEError, match=r"stages\.moe\.time: a time must be text; put it in quotes"):
        load_cluster(file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(L0MoEError, match=r"Cluster file .* does not exist; see slurm/clusters/"):
        load_cluster(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("24:00:00", 86400),
        ("1-12", 129600),
        ("2-00:30", 174600),
        ("1-00:00:01", 86401),
    ],
)
def test_times(text: str, seconds: int) -> None:
    assert time_seconds(text) == seconds

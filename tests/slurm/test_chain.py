"""The whole chain as jobs: a job array for the experts, dependencies, and every promised file at the end."""

import json

import pytest
from slurm.world import EXPERT_STEPS, MOE_STEPS, SlurmRun, metrics

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

STAGES = ("convert", "curate", "experts", "assemble", "moe", "export", "evaluate", "report")


def test_every_stage_was_a_job_after_the_ones_before(chain: SlurmRun) -> None:
    jobs = chain.jobs()
    assert tuple(jobs) == STAGES
    for stage, before in zip(STAGES[1:], STAGES, strict=False):
        (record,) = [r for r in chain.cluster.jobs(jobs[stage]) if r.get("ArrayTaskId", "0") == "0"]
        earlier = chain.cluster.jobs(jobs[before])
        assert {r["JobState"] for r in earlier} == {"COMPLETED"}
        assert record["StartTime"] >= max(r["EndTime"] for r in earlier), (stage, before)
        assert record["Requeue"] == "1"
    assert (chain.folder / "report" / "report.html").is_file()
    summary = json.loads((chain.folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["perplexity"]["l0moe"]["overall"] > 1


def test_experts_were_an_array_of_two_node_tasks_with_a_cap(chain: SlurmRun) -> None:
    first, second = sorted(
        chain.cluster.jobs(chain.jobs()["experts"]), key=lambda record: int(record["ArrayTaskId"])
    )
    assert (first["NumNodes"], second["NumNodes"]) == ("2", "2")
    assert first["ArrayTaskThrottle"] == "1"
    assert second["StartTime"] >= first["EndTime"]
    for k in (0, 1):
        folder = chain.folder / "experts" / f"{k:03d}"
        assert [row["iteration"] for row in metrics(folder)] == list(range(1, EXPERT_STEPS + 1))


def test_both_nodes_trained(chain: SlurmRun) -> None:
    """Each node's torchrun has its own folder of logs, and Megatron counted two processes."""
    assert [row["iteration"] for row in metrics(chain.folder / "moe")] == list(range(1, MOE_STEPS + 1))
    logs = chain.folder / "slurm" / "logs" / "moe"
    assert {folder.name for folder in logs.glob("*/node_*")} == {"node_0", "node_1"}


def test_a_second_command_submits_nothing(chain: SlurmRun) -> None:
    before = (chain.folder / "slurm" / "jobs.json").read_bytes()
    assert "nothing was submitted" in chain.submit()
    assert (chain.folder / "slurm" / "jobs.json").read_bytes() == before


def test_status_of_what_is_done(chain: SlurmRun) -> None:
    table = chain.l0moe("status", str(chain.folder)).splitlines()
    states = {words[0]: words for line in table if (words := line.split())}
    for stage in (*STAGES, "000", "001"):
        assert "done" in states[stage], table
    assert f"step {MOE_STEPS} of {MOE_STEPS}" in " ".join(states["moe"])

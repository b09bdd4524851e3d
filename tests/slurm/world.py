"""A toy run whose training jobs take two nodes each, the commands for it on the test cluster, and what it leaves."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from slurm.cluster import Cluster
from whole_chain import toy_world

from megatron_l0moe.checkpoints.torch_dist import CheckpointReader

EXPERTS = 2
EXPERT_STEPS, MOE_STEPS = 10, 36
MOE_SAVE_INTERVAL, EXPERT_SAVE_INTERVAL = 12, 4
PATIENCE = 600.0  # seconds; a training job takes some 20 s on two free cores, and minutes on busy ones
TWO_NODES = {"processes": 2, "nodes": 2}
CLUSTER: dict[str, Any] = {
    "partition": "batch",
    "gpus_per_node": 0,
    "cpus_per_node": 16,
    "memory_per_node": "60G",
    "experts_at_once": 1,
    "signal_lead_seconds": 60,
    "max_requeues": 5,
    "file_wait_seconds": 10,
}


@dataclass(frozen=True)
class SlurmRun:
    """A run on the test cluster."""

    cluster: Cluster
    recipe: Path
    runs: Path
    cluster_file: Path

    @property
    def folder(self) -> Path:
        """`runs/NAME`."""
        return self.runs / "toy"

    def l0moe(self, *words: str, check: bool = True) -> str:
        """Run our command on the head machine; returns what it printed, errors too."""
        done = self.cluster.run(
            *(sys.executable, "-m", "megatron_l0moe", *words), check=False, OMP_NUM_THREADS="1"
        )
        printed = done.stdout + done.stderr
        assert not (check and done.returncode), printed
        return printed

    def submit(self, *words: str, check: bool = True) -> str:
        """Submit the chain, or the part of it that the words choose."""
        slurm = ("--launcher", "slurm", "--cluster", str(self.cluster_file))
        return self.l0moe("run", str(self.recipe), "--runs-dir", str(self.runs), *slurm, *words, check=check)

    def jobs(self) -> dict[str, str]:
        """Return the number of the last job of each stage."""
        record = json.loads((self.folder / "slurm" / "jobs.json").read_text(encoding="utf-8"))
        return {job["stage"]: job["job"] for job in record["jobs"]}

    def logs(self) -> str:
        """Return the ends of all logs of its jobs."""
        files = sorted((self.folder / "slurm" / "logs").glob("*.log"))
        return "\n".join(f"== {file}\n{file.read_text(errors='replace')[-3000:]}" for file in files)

    def wait(self, stage: str, *states: str, timeout: float = PATIENCE) -> dict[str, str]:
        """Wait until the job of a stage is in one of the states, or has ended; returns what Slurm says of it."""
        try:
            return self.cluster.wait_for_job(self.jobs()[stage], *states, timeout=timeout)[0]
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from error

    def wait_for_step(self, step: int, folder: Path) -> None:
        """Wait until a training job has finished a step."""
        done = folder / "metrics.jsonl"
        self.cluster.wait_until(
            lambda: done.is_file() and len(done.read_bytes().splitlines()) >= step,
            PATIENCE,
            self.logs,
            every=0.03,
        )

    def workers(self, folder: Path) -> list[psutil.Process]:
        """Return the training processes that work in a folder, without those that start and watch them."""
        flag = f"--l0-stop-file {folder / 'stop'}"
        # The processes that load data are forks with the same command line.
        return [
            process
            for process in self.cluster.processes("megatron_l0moe.training.pretrain", flag)
            if (parent := process.parent()) and "torch.distributed.run" in parent.cmdline()
        ]


def make_world(cluster: Cluster, folder: Path) -> SlurmRun:
    """Write model, corpus, recipe and cluster file."""
    recipe = toy_world.make_world(folder)
    raw = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    raw["data"] |= {"tokens_per_expert": EXPERT_STEPS * 64, "tokens_per_set": MOE_STEPS * 32}
    raw["expert_training"] |= {
        "micro_batch_size": 1, "parallel": TWO_NODES, "save_interval": EXPERT_SAVE_INTERVAL
    }  # fmt: skip
    raw["moe_training"] |= {
        "micro_batch_size": 1, "parallel": TWO_NODES, "save_interval": MOE_SAVE_INTERVAL
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return SlurmRun(cluster, recipe, folder / "runs", write_cluster_file(folder / "cluster.yaml"))


def write_cluster_file(file: Path, **changes: Any) -> Path:
    """Write a cluster file for the test cluster with some keys changed."""
    stages = {
        name: {"time": "00:10:00", "cpus": 2}
        for name in ("convert", "curate", "assemble", "export", "evaluate", "report")
    }
    stages |= {name: {"time": "00:10:00", "memory": "8G"} for name in ("experts", "moe")}
    stages |= changes.pop("stages", {})
    file.write_text(yaml.safe_dump(CLUSTER | {"stages": stages} | changes), encoding="utf-8")
    return file


def copy_run(
    run: SlurmRun,
    folder: Path,
    *stages: str,
    recipe_changes: dict[str, Any] | None = None,
    **cluster_changes: Any,
) -> SlurmRun:
    """Return a run that has only these stages done; the changes of the recipe are keys of its sections."""
    for stage in stages:
        shutil.copytree(run.folder / stage, folder / "runs" / "toy" / stage)
    raw = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
    for section, changes in (recipe_changes or {}).items():
        raw[section] |= changes
    recipe = folder / "toy.yaml"
    recipe.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return SlurmRun(
        run.cluster, recipe, folder / "runs", write_cluster_file(folder / "cluster.yaml", **cluster_changes)
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a training job's metrics.jsonl."""
    file = folder / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def weights(checkpoints: Path) -> dict[str, torch.Tensor]:
    """Return all weights of a Megatron checkpoint."""
    reader = CheckpointReader(checkpoints)
    return {name: reader.read(name) for name in sorted(reader.model_names())}

"""How many nodes, GPUs, CPUs and how much memory the job of each stage takes, and whether the cluster has them."""

import re
from dataclasses import dataclass

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.launch.cluster import Cluster
from megatron_l0moe.recipe.recipe import Recipe, Section

TRAINING: dict[str, Section] = {"experts": "expert_training", "moe": "moe_training"}
"""Stages that train, and where the recipe has their layout."""
DEFAULT_CPUS = 8
"""Of a stage without GPUs."""
DEFAULT_AT_ONCE = 8
"""Expert jobs, where neither the cluster nor the recipe says how many."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one job of a stage asks for."""

    nodes: int
    gpus: int
    """Of each node."""
    cpus: int
    """Of each node."""
    memory: str | None
    """Of each node, as sbatch's --mem takes it; None: not asked for."""
    processes: int
    """Training processes on each node; 1 for other stages."""
    time: str
    exclusive: bool

    @property
    def all_gpus(self) -> int:
        """GPUs of the whole job."""
        return self.nodes * self.gpus


def resources(name: str, recipe: Recipe, cluster: Cluster) -> Resources:
    """Return what a job of a stage takes.

    Raises:
        L0MoEError: the recipe wants more of a node than it has.
    """
    found = _of_training(name, recipe, cluster) if name in TRAINING else _of_other(name, recipe, cluster)
    if found.cpus > cluster.cpus_per_node:
        raise L0MoEError(
            f"Stage {name} needs {found.cpus} CPUs of a node, and cpus_per_node is {cluster.cpus_per_node}; lower "
            + (
                f"{TRAINING[name]}.parallel.threads, or take more nodes."
                if name in TRAINING
                else "stages.cpus."
            )
        )
    return found


def experts_at_once(recipe: Recipe, cluster: Cluster) -> int:
    """Return how many expert jobs may run at the same time."""
    if cluster.experts_at_once is not None:
        return cluster.experts_at_once
    if recipe.gpus is None:
        return DEFAULT_AT_ONCE
    jobs = recipe.gpus // recipe.expert_training.parallel.processes
    return min(max(jobs, 1), recipe.model.num_experts)


def _of_training(name: str, recipe: Recipe, cluster: Cluster) -> Resources:
    section = TRAINING[name]
    parallel = recipe.parallel(section)
    each = parallel.processes // parallel.nodes
    gpus = each if cluster.gpus_per_node else 0
    if gpus > cluster.gpus_per_node:
        raise L0MoEError(
            f"{section}.parallel puts {parallel.processes} processes on {parallel.nodes} node(s), {each} on each, and "
            f"gpus_per_node is {cluster.gpus_per_node}; set {section}.parallel.nodes to "
            f"{_nodes_for(parallel.processes, cluster.gpus_per_node)}."
        )
    cpus = _share_of_cpus(gpus, cluster) if gpus else each * parallel.threads
    return Resources(
        nodes=parallel.nodes,
        gpus=gpus,
        cpus=cpus,
        memory=cluster.stage(name).memory or _share_of_memory(gpus, cpus, cluster),
        processes=each,
        time=cluster.stage(name).time,
        exclusive=cluster.exclusive and gpus == cluster.gpus_per_node,
    )


def _of_other(name: str, recipe: Recipe, cluster: Cluster) -> Resources:
    stage = cluster.stage(name)
    gpus, cpus = stage.gpus, stage.cpus
    if (
        name == "curate" and recipe.data.executor.kind == "slurm"
    ):  # a driver, which only waits for its own arrays
        gpus, cpus = gpus or 0, cpus or 1
    if gpus is None:
        gpus = min(1, cluster.gpus_per_node) if name in ("curate", "evaluate") else 0
    if cpus is None:
        cpus = _share_of_cpus(gpus, cluster) if gpus else min(DEFAULT_CPUS, cluster.cpus_per_node)
    return Resources(
        nodes=1,
        gpus=gpus,
        cpus=cpus,
        memory=stage.memory or _share_of_memory(gpus, cpus, cluster),
        processes=1,
        time=stage.time,
        exclusive=False,
    )


def _nodes_for(processes: int, gpus_per_node: int) -> int:
    """Return the fewest nodes that hold the processes, the same number on each."""
    return next(n for n in range(1, processes + 1) if processes % n == 0 and processes // n <= gpus_per_node)


def _share_of_cpus(gpus: int, cluster: Cluster) -> int:
    return max(1, cluster.cpus_per_node * gpus // cluster.gpus_per_node)


def _share_of_memory(gpus: int, cpus: int, cluster: Cluster) -> str | None:
    """Return the part of a node's memory that goes with a job's GPUs, or with its CPUs where it has none."""
    memory = cluster.memory_per_node
    if memory in (None, "0"):
        return memory
    parts = re.fullmatch(r"(\d+)([KMGT]?)", memory or "")
    assert parts, "the cluster file was checked"
    whole = gpus == cluster.gpus_per_node if gpus else cpus == cluster.cpus_per_node
    if whole:
        return memory
    mebibytes = int(parts[1]) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}[parts[2]]
    share = gpus / cluster.gpus_per_node if gpus else cpus / cluster.cpus_per_node
    return f"{max(1, int(mebibytes * share))}M"

"""What is wrong with a run on a cluster is said before anything is queued."""

import dataclasses
import logging
from collections.abc import Sequence

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.launch import preflight
from megatron_l0moe.launch.cluster import Cluster
from megatron_l0moe.launch.resources import TRAINING, resources
from megatron_l0moe.launch.stages import StageSpec
from megatron_l0moe.plan.plan import make_plan
from megatron_l0moe.recipe.layout_rules import check_layout
from megatron_l0moe.recipe.recipe import Recipe, layout_names
from megatron_l0moe.sizes.gpu_models import find_gpu

logger = logging.getLogger(__name__)


def check_cluster(recipe: Recipe, cluster: Cluster, selected: Sequence[StageSpec]) -> None:
    """Check a recipe against a cluster: GPUs and CPUs of a node, the layouts, memory.

    Raises:
        L0MoEError: something does not fit; one sentence.
    """
    for spec in selected:
        resources(spec.name, recipe, cluster)
        if section := TRAINING.get(spec.name):
            sizes = dataclasses.replace(recipe.job_sizes(section), has_gpu=cluster.gpus_per_node > 0)
            nodes = recipe.parallel(section).nodes
            if spec.name == "experts" and recipe.construction is not None and nodes > 1:
                raise L0MoEError(
                    f"expert_training.parallel.nodes is {nodes}, but experts of the method "
                    f"{recipe.expert_training.method} are made on one node; set it to 1."
                )
            check_layout(recipe.parallel(section).layout, sizes, layout_names(section))
        if spec.name == "curate" and recipe.data.executor.kind == "slurm" and cluster.container:
            raise L0MoEError(
                "data.executor.kind is slurm, and in a container there is no sbatch to submit curate's tasks with; set "
                "it to local, or run `l0moe curate` outside of the container first."
            )


def check_memory(recipe: Recipe, cluster: Cluster, selected: Sequence[StageSpec]) -> None:
    """Check by formula that the layouts fit into the cluster's GPUs, where the cluster file names them.

    Of methods beside L0-MoE there is no formula, so nothing is checked, and that is logged.

    Raises:
        L0MoEError: a layout needs more memory than a GPU has; the message says by how much and what would fit.
    """
    sections = {TRAINING[spec.name] for spec in selected if spec.name in TRAINING}
    if cluster.gpu is None or cluster.gpus_per_node == 0 or not sections:
        return
    if recipe.method != "l0moe":
        logger.warning("Memory was not checked: there is no formula for method %s.", recipe.method)
        return
    plan = make_plan(recipe, gpu=find_gpu(cluster.gpu))
    wanted = tuple(stage for stage in plan.stages if stage.section in sections)
    if problem := dataclasses.replace(plan, stages=wanted).problem():
        raise problem


def check_files(recipe: Recipe) -> None:
    """Check a recipe against the model and the corpus, as a run on this machine does.

    Raises:
        L0MoEError: something is missing or does not fit.
    """
    preflight.check(recipe)

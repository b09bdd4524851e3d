"""Checks before the first hour is spent or anything is queued: the model's config.json, this machine, the cluster."""

import dataclasses
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_l0moe.chain.slurm.cluster import Cluster, resources
from megatron_l0moe.conversion import targets
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.evaluation.harness import benchmarks
from megatron_l0moe.methods.method import method_of
from megatron_l0moe.plan.plan import make_plan
from megatron_l0moe.recipe.layout import Layout
from megatron_l0moe.recipe.layout_rules import JobSizes, Names, check_layout
from megatron_l0moe.recipe.recipe import SECTIONS, Recipe, Section, layout_names
from megatron_l0moe.runs.stages import TRAINING, StageSpec
from megatron_l0moe.runtime.hardware import visible_gpus
from megatron_l0moe.sizes.architecture import Architecture, job_sizes
from megatron_l0moe.sizes.gpu_models import find_gpu

logger = logging.getLogger(__name__)


def check(recipe: Recipe) -> Architecture:
    """Check a recipe against the model and the files it names; returns the model's architecture.

    Raises:
        L0MoEError: something is missing or does not fit; one sentence.
    """
    architecture = Architecture.from_hf(Path(recipe.model.path))
    check_sizes(recipe, architecture)
    if "://" not in recipe.data.corpus and not Path(recipe.data.corpus).exists():
        raise L0MoEError(
            f"data.corpus: the folder {recipe.data.corpus} does not exist; give a folder of shards or one file, "
            "relative to the folder that the command is run in, or a URL such as s3://bucket/folder."
        )
    if recipe.evaluation.benchmarks is not None:
        with tempfile.TemporaryDirectory() as folder:
            benchmarks.prepare(recipe.evaluation.benchmarks, Path(folder))
    return architecture


def check_sizes(recipe: Recipe, architecture: Architecture) -> None:
    """Check the recipe's sizes against those of the dense model."""
    model = recipe.model
    if model.dense_layers >= architecture.num_layers:
        raise L0MoEError(
            f"model.dense_layers ({model.dense_layers}) must be smaller than the model's {architecture.num_layers} "
            f"layers; use at most {architecture.num_layers - 1}."
        )
    if model.expert_ffn > architecture.ffn_hidden_size:
        raise L0MoEError(
            f"model.expert_ffn ({model.expert_ffn}) must be at most the dense model's FFN width, "
            f"{architecture.ffn_hidden_size}."
        )
    if recipe.data.seq_length > architecture.exact_positions:
        raise L0MoEError(
            f"data.seq_length ({recipe.data.seq_length}) must be at most the model's max_position_embeddings and "
            f"sliding window, {architecture.exact_positions}."
        )
    if recipe.method == "l0moe":
        check_target(recipe, architecture)
    method_of(recipe.method).check_model(recipe, architecture)
    if recipe.evaluation.parity_positions > recipe.data.seq_length:
        raise L0MoEError(
            f"evaluation.parity_positions ({recipe.evaluation.parity_positions}) must be at most data.seq_length "
            f"({recipe.data.seq_length}); lower it."
        )
    for section in SECTIONS:
        check_layout(
            recipe.parallel(section).layout, job_sizes(recipe, section, architecture), layout_names(section)
        )


def check_target(recipe: Recipe, architecture: Architecture) -> None:
    """Refuse engines that no layout can be written for, and a layout that `evaluate` could not load."""
    first = targets.plan(recipe.export.target, targets.Model.of(architecture))[0]
    if ("transformers", first.form) in targets.WRONG:
        raise L0MoEError(
            f"export.target {recipe.export.target!r} writes a layout that transformers, which evaluates the export, "
            "cannot load; use 'all'."
        )


def check_machine(recipe: Recipe, *sections: Section) -> None:
    """Refuse jobs that this machine cannot start; without sections: any job of the recipe."""
    gpus = visible_gpus()
    for section in sections or SECTIONS:
        parallel = recipe.parallel(section)
        if parallel.nodes > 1:
            raise L0MoEError(
                f"{section}.parallel.nodes is {parallel.nodes}, and this command runs on one machine; show the "
                "commands for the cluster with --dry-run, or set nodes to 1."
            )
        check_gpus(parallel.layout, recipe.job_sizes(section), layout_names(section), gpus)
        wanted = recipe.expert_training.at_once * parallel.processes
        if section == "expert_training" and 0 < gpus < wanted:
            raise L0MoEError(
                f"expert_training.at_once ({recipe.expert_training.at_once}) jobs of {parallel.processes} GPUs need "
                f"{wanted} of this machine's {gpus}; use at most {gpus // parallel.processes}."
            )


def check_gpus(layout: Layout, sizes: JobSizes, names: Names, gpus: int) -> None:
    """Refuse a layout with more processes than GPUs, or one that needs a GPU where there is none (0: the CPU)."""
    check_layout(layout, dataclasses.replace(sizes, has_gpu=gpus > 0), names)
    if 0 < gpus < layout.processes:
        raise L0MoEError(
            f"{names['processes']} ({layout.processes}) must be at most the {gpus} GPUs of this machine, one for each "
            f"process; use at most {gpus}."
        )


def check_cluster(recipe: Recipe, cluster: Cluster, selected: Sequence[StageSpec]) -> None:
    """Check a recipe against a cluster: GPUs and CPUs of a node, the layouts, memory."""
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
    """Check a recipe against the model and the corpus, as a run on this machine does."""
    check(recipe)

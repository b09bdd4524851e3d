"""What a recipe will take: the numbers of `l0moe plan`, from formulas and the model's config.json."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.planning import proposals
from megatron_l0moe.planning.activations import Workload
from megatron_l0moe.planning.speed import DecodeSpeed, PrefillSpeed, decode_speeds, prefill_speed
from megatron_l0moe.planning.storage import CheckpointSize, checkpoint_size, expert_file_bytes, token_bytes
from megatron_l0moe.recipe.layout_rules import check_layout
from megatron_l0moe.recipe.recipe import Recipe, Section, layout_names
from megatron_l0moe.sizes.architecture import PUBLISHED, Architecture, job_sizes, read_config
from megatron_l0moe.sizes.flops import (
    Flops,
    Recompute,
    StageModel,
    TrainingStage,
    stage_model,
    training_flops,
)
from megatron_l0moe.sizes.gpu_models import GPUS_PER_NODE, Gpu

MFU = {"expert_training": 0.40, "moe_training": 0.25}
"""Model FLOPs utilisation that GPU-hours are computed with; an assumption, not measured here."""
STAGES: tuple[TrainingStage, TrainingStage] = ("expert", "moe")
TITLES = {"expert_training": "experts", "moe_training": "moe"}


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One training stage."""

    section: Section
    job: proposals.Job
    mine: proposals.Candidate
    """The recipe's own layout."""
    flops: Flops
    """Of one token."""
    tokens: int
    """Of all jobs of the stage."""
    mfu: float
    gpu_hours: float
    """Of all jobs, at this MFU."""
    checkpoint: CheckpointSize
    proposals: proposals.Proposals | None
    """For --gpus."""
    excess: float
    """Bytes that the recipe's layout needs above what the GPU has; 0 where it fits."""

    @property
    def title(self) -> str:
        """The stage's name."""
        return TITLES[self.section]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole recipe."""

    recipe: Recipe
    source: str
    """Where the model's sizes are from."""
    gpu: Gpu
    gpus: int | None
    dense: StageModel
    moe: StageModel
    stages: tuple[StagePlan, ...]
    expert_store: int
    """Bytes of all K expert files."""
    export: int
    """Bytes of the exported model."""
    token_files: int
    """Bytes of the curated training sets."""
    prefill: PrefillSpeed
    decode: list[DecodeSpeed]
    context: int
    """Tokens before the decode step."""

    def problem(self) -> L0MoEError | None:
        """Say which of the recipe's layouts does not fit into memory, by how much, and what would."""
        for stage in self.stages:
            if stage.excess <= 0:
                continue
            gpus = stage.mine.layout.processes
            found = proposals.propose(stage.job, self.gpu, gpus)
            refused = proposals.refuse(stage.mine, found.all_fitting, self.gpu)
            text = proposals.refusal_text(refused, self.gpu)
            return L0MoEError(f"{stage.section}.parallel: {text}.")
        return None


def make_plan(recipe: Recipe, *, gpu: Gpu, gpus: int | None = None, mfu: float | None = None) -> Plan:
    """Compute the plan of a recipe.

    Args:
        gpus: propose layouts for so many GPUs, beside the recipe's own; None: do not.
        mfu: for GPU-hours of both training stages; None: `MFU`.

    Raises:
        L0MoEError: the model's sizes are not known, the recipe does not fit them, or its method is not counted.
    """
    if recipe.method != "l0moe":
        raise L0MoEError(
            f"l0moe plan counts recipes of method l0moe only, and method is {recipe.method}; `l0moe run RECIPE "
            "--dry-run` shows its tokens, steps and commands."
        )
    if gpus is not None and gpus > GPUS_PER_NODE and gpus % GPUS_PER_NODE:
        raise L0MoEError(
            f"--gpus ({gpus}) must be at most {GPUS_PER_NODE} or whole nodes of {GPUS_PER_NODE}; "
            f"use {gpus // GPUS_PER_NODE * GPUS_PER_NODE}."
        )
    architecture, source = find_architecture(recipe.model.path)
    recipe = recipe.settled("bfloat16")  # the plan is one for GPUs
    bf16 = recipe.trains_in_bf16("moe_training")
    dense, moe = stage_models(recipe, architecture)
    stages = (
        _stage(recipe, "expert_training", dense, gpu, gpus, mfu),
        _stage(recipe, "moe_training", moe, gpu, gpus, mfu),
    )
    data, k = recipe.data, recipe.model.num_experts
    tokens = data.tokens_per_expert * k + data.tokens_per_set * (data.iterations - 1)
    wide = 2 if bf16 else 4
    return Plan(
        recipe=recipe,
        source=source,
        gpu=gpu,
        gpus=gpus,
        dense=dense,
        moe=moe,
        stages=stages,
        expert_store=k * expert_file_bytes(moe, bf16=bf16, with_weights=recipe.expert_training.train_weights),
        export=moe.counts.total * wide,
        token_files=tokens * token_bytes(architecture.vocab_size),
        prefill=prefill_speed(dense, moe, recipe.evaluation.prefill_tokens),
        decode=decode_speeds(dense, moe, gpu, recipe.evaluation.prefill_tokens),
        context=recipe.evaluation.prefill_tokens,
    )


def stage_models(recipe: Recipe, architecture: Architecture) -> tuple[StageModel, StageModel]:
    """Return the models of a recipe's two training stages: the dense one under masks, and the L0-MoE."""
    expert, moe = (
        stage_model(
            architecture,
            stage,
            dense_layers=recipe.model.dense_layers,
            num_experts=recipe.model.num_experts,
            expert_ffn=recipe.model.expert_ffn,
            top_k=recipe.model.top_k,
            trains_weights=recipe.expert_training.train_weights,
        )
        for stage in STAGES
    )
    return expert, moe


def find_architecture(path: str) -> tuple[Architecture, str]:
    """Return the sizes of the model folder, or those published under its name, and which of the two.

    Raises:
        L0MoEError: no such folder, and no sizes are known by its name.
    """
    folder = Path(path)
    published = PUBLISHED.get(folder.name.lower())
    if published is not None and not folder.exists():
        return (
            Architecture.from_config(published, Path(folder.name)),
            f"{folder} does not exist; sizes as published for {folder.name}",
        )
    return Architecture.from_config(read_config(folder), folder / "config.json"), str(folder / "config.json")


def recompute_of(flags: dict[str, bool | int | float | str]) -> Recompute:
    """Read Megatron's recomputation flags; `block` recomputation is counted as if nothing was recomputed."""
    granularity = str(flags.get("recompute-granularity", "none"))
    if granularity == "selective":
        return Recompute(
            granularity="selective", modules=tuple(str(flags.get("recompute-modules", "core_attn")).split())
        )
    if granularity == "full" and flags.get("recompute-method") != "block":
        return Recompute(granularity="full", group=int(flags.get("recompute-num-layers", 1)))
    return Recompute()


def recipe_keys(candidate: proposals.Candidate) -> dict[str, Any]:
    """Return a proposed layout as keys of a recipe's training section, or of a section of one of its `layouts`.

    `at_once` where a node takes several jobs, `parallel`, and the `flags` of recomputation if there are any.
    """
    layout, recompute = candidate.layout, candidate.recompute
    values: dict[str, bool | int | str] = {
        "processes": layout.processes,
        "nodes": -(-layout.processes // GPUS_PER_NODE),
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "virtual_pipeline": layout.virtual_pipeline,
        "expert": layout.expert,
    }
    if layout.expert_tensor is not None:
        values["expert_tensor"] = layout.expert_tensor
    flags: dict[str, bool | int | str] = {}
    if recompute.granularity != "none":
        flags["recompute-granularity"] = recompute.granularity
    if recompute.full:
        flags |= {"recompute-method": "uniform", "recompute-num-layers": recompute.group}
    elif recompute.modules:
        flags["recompute-modules"] = " ".join(recompute.modules)
    always = ("processes", "expert_tensor")  # 1 is not the default of expert_tensor
    kept = {key: value for key, value in values.items() if key in always or value != 1}
    found: dict[str, Any] = {}
    if (at_once := min(candidate.at_once, GPUS_PER_NODE // layout.processes)) > 1:
        found["at_once"] = at_once
    found["parallel"] = kept | {"distributed_optimizer": layout.distributed_optimizer}
    return found | ({"flags": flags} if flags else {})


def _stage(
    recipe: Recipe, section: Section, model: StageModel, gpu: Gpu, gpus: int | None, mfu: float | None
) -> StagePlan:
    is_moe = section == "moe_training"
    training = recipe.moe_training if is_moe else recipe.expert_training
    flags, layout = training.flags, training.parallel.layout
    sizes = job_sizes(recipe, section, model.architecture)
    check_layout(layout, sizes, layout_names(section))
    recompute = recompute_of(flags)
    workload = Workload(
        seq_length=recipe.data.seq_length,
        micro_batch=training.micro_batch_size,
        global_batch=sizes.global_batch or 1,
        bf16=recipe.trains_in_bf16(section),
        recompute=recompute,
        overlaps_gradients=flags.get("overlap-grad-reduce") is True,
    )
    steps = recipe.moe_steps if is_moe else recipe.expert_steps
    job = proposals.Job(
        model=model,
        workload=workload,
        sizes=dataclasses.replace(sizes, has_gpu=True),
        names=layout_names(section),
        steps=steps,
        jobs=1 if is_moe else recipe.model.num_experts,
    )
    flops = training_flops(model, workload.seq_length, recompute)
    tokens = steps * workload.global_batch * workload.seq_length * job.jobs
    utilisation = mfu or MFU[section]
    mine = proposals.evaluate(job, layout, recompute, gpu, gpus or layout.processes)
    return StagePlan(
        section=section,
        job=job,
        mine=mine,
        flops=flops,
        tokens=tokens,
        mfu=utilisation,
        gpu_hours=tokens * flops.model / (utilisation * gpu.bf16_flops) / 3600,
        checkpoint=checkpoint_size(model, bf16=workload.bf16),
        proposals=proposals.propose(job, gpu, gpus) if gpus else None,
        excess=max(mine.memory.total - gpu.usable, 0.0),
    )

"""What a recipe will take: the numbers of `l0moe plan`, from formulas and the model's config.json.

The expected speed of a trained L0-MoE against its dense base has two bounds that do not depend on the GPU: the ratio of
active weights (compute) and of weights read (memory, uniform routing). And a roofline of one GPU: a pass takes as long
as its products at peak or its bytes at full bandwidth, whichever is longer, the KV cache included. Kernels, launches
and sampling cost nothing there: real speeds are lower.

Table 5 of the paper stands beside counts from the sizes it states; where the two do not agree, the plan says so.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.plan import proposals
from megatron_l0moe.plan.memory import (
    CheckpointSize,
    Workload,
    checkpoint_size,
    expert_file_bytes,
    token_bytes,
)
from megatron_l0moe.recipe.layout_rules import check_layout
from megatron_l0moe.recipe.recipe import Recipe, Section, layout_names
from megatron_l0moe.sizes.architecture import (
    LLAMA_3_8B,
    MISTRAL_7B_V01,
    PUBLISHED,
    QWEN2_7B,
    Architecture,
    job_sizes,
    read_config,
)
from megatron_l0moe.sizes.flops import (
    Flops,
    Recompute,
    StageModel,
    TrainingStage,
    forward_flops,
    stage_model,
    training_flops,
)
from megatron_l0moe.sizes.gpu_models import GPUS_PER_NODE, Gpu
from megatron_l0moe.sizes.parameters import ParameterCounts, pass_bounds

FITTING_DENSE_LAYERS = 4
"""The number of dense layers with which Table 5's columns of parameters come out for all three models."""


@dataclass(frozen=True, kw_only=True)
class Table5Row:
    """One base model and its L0-MoE, as the paper has them."""

    name: str
    config: dict[str, Any]
    dense_layers: int
    """Section A.1: 4 for Qwen2, 8 for Mistral and Llama3."""
    expert_ffn: int
    dense_billions: float
    total_billions: float
    active_billions: float
    speedup: float
    """Table 1."""

    def architecture(self) -> Architecture:
        """Return the base model's sizes."""
        return Architecture.from_config(self.config, Path("Table 5"))

    def moe(self, dense_layers: int | None = None) -> StageModel:
        """Return the L0-MoE with the stated number of dense layers, or another."""
        layers = self.dense_layers if dense_layers is None else dense_layers
        return stage_model(
            self.architecture(),
            "moe",
            dense_layers=layers,
            num_experts=64,
            expert_ffn=self.expert_ffn,
            top_k=2,
        )

    def dense(self) -> StageModel:
        """Return the base model."""
        return stage_model(
            self.architecture(),
            "expert",
            dense_layers=self.dense_layers,
            num_experts=64,
            expert_ffn=self.expert_ffn,
            top_k=2,
        )


TABLE5 = (
    Table5Row(
        name="Llama-3-8B",
        config=LLAMA_3_8B,
        dense_layers=8,
        expert_ffn=1024,
        dense_billions=7.5,
        total_billions=25.1,
        active_billions=3.2,
        speedup=2.0,
    ),
    Table5Row(
        name="Mistral-7B",
        config=MISTRAL_7B_V01,
        dense_layers=8,
        expert_ffn=1024,
        dense_billions=7.1,
        total_billions=24.7,
        active_billions=2.9,
        speedup=2.1,
    ),
    Table5Row(
        name="Qwen2-7B",
        config=QWEN2_7B,
        dense_layers=4,
        expert_ffn=1280,
        dense_billions=7.0,
        total_billions=23.3,
        active_billions=2.8,
        speedup=2.5,
    ),
)


def paper_total(counts: ParameterCounts) -> int:
    """Return all weights but one embedding table: the way of counting that gives the paper's dense models."""
    return counts.total - counts.embedding if not counts.tied else counts.total


def full_active(counts: ParameterCounts) -> int:
    """Return the active weights with the embedding table, of which a token looks up one row."""
    return counts.active + (0 if counts.tied else counts.embedding)


def agrees(count: float, printed: float) -> bool:
    """Whether a count, in billions, is the printed one after rounding or cutting off to one digit."""
    return round(count, 1) == printed or int(count * 10) / 10 == printed


def disagreement(row: Table5Row) -> str | None:
    """Say where Table 5's L0-MoE columns do not follow from the paper's text, or None."""
    stated, fitting = row.moe().counts, row.moe(FITTING_DENSE_LAYERS).counts
    if agrees(paper_total(stated) / 1e9, row.total_billions) and agrees(
        stated.active / 1e9, row.active_billions
    ):
        return None
    return (
        f"Table 5 prints {row.total_billions:g} / {row.active_billions:g} billion for {row.name}'s L0-MoE, the text "
        f"({row.dense_layers} dense layers) gives {_billions(paper_total(stated))} / {_billions(stated.active)}; "
        f"{FITTING_DENSE_LAYERS} dense layers would give {_billions(paper_total(fitting))} / "
        f"{_billions(fitting.active)}"
    )


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f}"


BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WEIGHT_BYTES = 2
"""The bytes of a served weight, in bf16."""


@dataclass(frozen=True, kw_only=True)
class DecodeSpeed:
    """One decode step of `batch` sequences: dense time over L0-MoE time (> 1: the L0-MoE is faster)."""

    batch: int
    active: float
    """Ratio of active weights: what compute allows."""
    bytes_read: float
    """Ratio of weights read: what memory allows."""
    roofline: float
    """Ratio of the roofline's times, KV cache included."""
    dense_tokens_per_second: float
    """The roofline's, on one GPU."""
    moe_tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class PrefillSpeed:
    """A prefill of one sequence, compute bound."""

    tokens: int
    active: float
    """Ratio of active weights."""
    flops: float
    """Ratio of all FLOPs, attention scores included."""


def prefill_speed(dense: StageModel, moe: StageModel, tokens: int) -> PrefillSpeed:
    """Return the bounds of a prefill."""
    return PrefillSpeed(
        tokens=tokens,
        active=pass_bounds(dense.counts, moe.counts, tokens=tokens, logits=tokens).active,
        flops=forward_flops(dense, tokens) / forward_flops(moe, tokens),
    )


def decode_speeds(dense: StageModel, moe: StageModel, gpu: Gpu, context: int) -> list[DecodeSpeed]:
    """Return the speeds of decode steps after `context` tokens, for each batch size."""
    found = []
    for batch in BATCHES:
        bounds = pass_bounds(dense.counts, moe.counts, tokens=batch, logits=batch)
        times = [_decode_seconds(model, gpu, batch, context) for model in (dense, moe)]
        found.append(
            DecodeSpeed(
                batch=batch,
                active=bounds.active,
                bytes_read=bounds.bytes_read,
                roofline=times[0] / times[1],
                dense_tokens_per_second=batch / times[0],
                moe_tokens_per_second=batch / times[1],
            )
        )
    return found


def kv_cache_bytes(model: StageModel) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    return 2 * model.architecture.num_layers * model.kv_width * WEIGHT_BYTES


def _decode_seconds(model: StageModel, gpu: Gpu, batch: int, context: int) -> float:
    scores = 4.0 * context * model.query_width * model.architecture.num_layers
    flops = batch * (2.0 * model.counts.active + scores)
    read = WEIGHT_BYTES * model.counts.read(batch) + batch * context * kv_cache_bytes(model)
    return max(flops / gpu.bf16_flops, read / gpu.memory_bandwidth)


MFU = {"expert_training": 0.40, "moe_training": 0.25}
"""Model FLOPs utilisation that GPU-hours are computed with; an assumption, not measured here."""
STAGES: tuple[TrainingStage, TrainingStage] = ("expert", "moe")
TITLES = {"expert_training": "experts", "moe_training": "moe"}


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One training stage."""

    section: Section
    job: proposals.PlannedJob
    mine: proposals.Candidate
    """The recipe's own layout."""
    flops: Flops
    """The operations of one token."""
    tokens: int
    """The tokens of all jobs of the stage."""
    mfu: float
    gpu_hours: float
    """The GPU-hours of all jobs, at this MFU."""
    checkpoint: CheckpointSize
    proposals: proposals.Proposals | None
    """The layouts that answer --gpus."""
    excess: float
    """Bytes that the recipe's layout needs above what the GPU has; 0 where it fits."""

    @property
    def title(self) -> str:
        """The stage's name."""
        return TITLES[self.section]


@dataclass(frozen=True, kw_only=True)
class RunPlan:
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


def make_plan(recipe: Recipe, *, gpu: Gpu, gpus: int | None = None, mfu: float | None = None) -> RunPlan:
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
    return RunPlan(
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
    job = proposals.PlannedJob(
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

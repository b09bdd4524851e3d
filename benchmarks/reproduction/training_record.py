"""What training cost and how it went, small enough to keep: losses against FLOPs, retention, overlap of the experts.

K = experts, n = steps of one expert run.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from results import BASE, TRAINING, save
from settings import Place

from megatron_l0moe.recipe.recipe import section_hash
from megatron_l0moe.reports.collect import ExpertFiles, Json, read_metrics, read_units
from megatron_l0moe.reports.summary import expert_training, experts_overlap
from megatron_l0moe.runs.stages import Run
from megatron_l0moe.sizes.architecture import Architecture
from megatron_l0moe.sizes.flops import (
    Recompute,
    StageModel,
    TrainingStage,
    dense_model,
    forward_flops,
    stage_model,
    training_flops,
)

CURVE_BINS = 60
"""Points of a loss curve, each the mean of its steps."""
PRETRAINING = "pretraining"


def record_base(place: Place) -> None:
    """Write results/training/base."""
    made = place.root / "base"

    def work() -> Json:
        seed = None if place.is_pretrained else place.own_base.training.seed
        return {"seed": seed, "phases": _pretraining(place, made)}

    _save(place, BASE, made, work)


def record_dense(place: Place, name: str, pretrained: Path, further: Path) -> None:
    """Write results/training/NAME of a yardstick: its pretraining, which may be the base's, then its training."""

    def work() -> Json:
        return {"phases": [*_pretraining(place, pretrained), _dense(place, further, "further")]}

    _save(place, name, further, work)


def record_chain(place: Place, run: Run) -> None:
    """Write results/training/NAME of a run of the chain."""
    recipe = run.recipe

    def whole_ffn() -> Json:
        # in training DSMoE and Mixture-of-Masks compute the dense FFN; gates and routers are left out
        model = dense_model(Architecture.from_hf(place.base_model))
        phases = [*_pretraining(place, place.root / "base"), _moe(place, run, model)]
        return {"iterations": recipe.data.iterations, "phases": phases}

    def work() -> Json:
        if recipe.method != "l0moe":
            return whole_ffn()
        files = [_expert_files(run, k) for k in range(recipe.model.num_experts)]
        channels = Architecture.from_hf(place.base_model).ffn_hidden_size
        made = [_experts(place, run, files), _moe(place, run, _model(place, run, "moe"))]
        return {
            "num_experts": recipe.model.num_experts,
            "iterations": recipe.data.iterations,
            "phases": [*_pretraining(place, place.root / "base"), *made],
            "retention": [expert_training(k, expert) for k, expert in enumerate(files) if expert.metrics],
            "overlap": experts_overlap(files, width=recipe.model.expert_ffn, channels=channels),
        }

    _save(place, recipe.name, run.stage_folder("export"), work)


def phase(name: str, rows: Sequence[Json], flops_per_token: float, *, runs: int = 1) -> Json:
    """Return what a phase cost and its losses.

    Args:
        name: of the phase.
        rows: of one run, a row a step: tokens so far, loss.
        flops_per_token: of training.
        runs: that went on side by side, each with these tokens.
    """
    edges = [round(i * len(rows) / CURVE_BINS) for i in range(CURVE_BINS + 1)]
    bins = [rows[start:end] for start, end in itertools.pairwise(edges) if end > start]
    tokens = runs * int(rows[-1]["tokens"])
    return {
        "name": name,
        "runs": runs,
        "tokens": tokens,
        "flops": tokens * flops_per_token,
        "flops_per_token": flops_per_token,
        "curve": {
            # the middle of the tokens that a point is the mean of
            "flops": [runs * flops_per_token * statistics.fmean(row["tokens"] for row in b) for b in bins],
            "lm_loss": [statistics.fmean(row["lm_loss"] for row in b) for b in bins],
        },
    }


def _pretraining(place: Place, folder: Path) -> list[Json]:
    """Return the phase of a base's pretraining, none of a base that was there."""
    return [] if place.is_pretrained else [_dense(place, folder, PRETRAINING)]


def _dense(place: Place, folder: Path, name: str) -> Json:
    model = dense_model(Architecture.from_hf(folder / "hf"))
    return phase(name, read_metrics(folder / "metrics.jsonl", name), _per_token(place, model))


def _experts(place: Place, run: Run, files: Sequence[ExpertFiles]) -> Json:
    recipe, count = run.recipe, len(files)
    if recipe.construction is None:
        steps = zip(*(expert.metrics for expert in files), strict=True)  # n of K rows each
        mean = [
            {"tokens": rows[0]["tokens"], "lm_loss": math.fsum(row["lm_loss"] for row in rows) / count}
            for rows in steps
        ]
        return phase("experts", mean, _per_token(place, _model(place, run, "expert")), runs=count)
    tokens = count * recipe.calibration_sequences * recipe.data.seq_length
    forward = forward_flops(dense_model(Architecture.from_hf(place.base_model)), recipe.data.seq_length)
    return {
        "name": "calibration",
        "runs": count,
        "tokens": tokens,
        "flops": tokens * forward,
        "flops_per_token": forward,
        "curve": {"flops": [], "lm_loss": []},
    }


def _moe(place: Place, run: Run, model: StageModel) -> Json:
    rows = read_metrics(run.stage_folder("moe") / "metrics.jsonl", "moe")
    return phase("moe", rows, _per_token(place, model))


def _model(place: Place, run: Run, stage: TrainingStage) -> StageModel:
    model = run.recipe.model
    return stage_model(
        Architecture.from_hf(place.base_model),
        stage,
        dense_layers=model.dense_layers,
        num_experts=model.num_experts,
        expert_ffn=model.expert_ffn,
        top_k=model.top_k,
        trains_weights=run.recipe.expert_training.train_weights,
    )


def _per_token(place: Place, model: StageModel) -> float:
    return training_flops(model, place.settings.data.seq_length, Recompute()).model


def _expert_files(run: Run, k: int) -> ExpertFiles:
    folder = run.expert_folder(k)
    trained = run.recipe.construction is None
    return ExpertFiles(
        metrics=read_metrics(folder / "metrics.jsonl", "experts") if trained else [],
        units=read_units(folder / "expert.safetensors"),
    )


def _save(place: Place, name: str, made: Path, work: Callable[[], Json]) -> None:
    save(place, name, TRAINING, section_hash(place.settings.data.seq_length), (made,), work)

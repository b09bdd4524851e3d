"""Reading what the stages of a run left behind; nothing is computed here, and no torch is needed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe import Recipe
from megatron_l0moe.reports.gpu_samples import read_gpu_samples

Json = dict[str, Any]
STAGES = ("convert", "curate", "experts", "assemble", "moe", "export", "evaluate")
ONLY_L0MOE = ("experts", "assemble")


@dataclass(frozen=True, kw_only=True)
class ExpertFiles:
    """One domain's expert run."""

    metrics: list[Json]
    """Empty where the expert was made without training."""
    units: dict[int, npt.NDArray[np.int64]]
    """FFN units that were kept, sorted, by MoE layer."""


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """Everything that the report is made from."""

    recipe: Recipe
    dense_config: Json
    export_config: Json
    ccm: Json
    curate: Json
    experts: list[ExpertFiles]
    """Empty for a method without expert runs."""
    moe_metrics: list[Json]
    perplexity: Json
    speed: Json
    router_load: Json
    """Empty for a method without routers."""
    open_blocks: Json
    """Of a DSMoE; else empty."""
    parity: Json
    benchmarks: Json
    """Empty where the recipe asks for none."""
    gpu_samples: Json
    """Power, memory and energy by training stage; empty where no GPU was sampled."""
    manifests: dict[str, Json]
    """By folder inside the run, e.g. `moe` or `experts/003`."""


def collect(recipe: Recipe, run: Path) -> RunFiles:
    """Read the run folder.

    Raises:
        L0MoEError: a file is missing or broken; the message names the stage to run.
    """
    is_l0moe = recipe.method == "l0moe"
    expert_folders = [f"experts/{k:03d}" for k in range(recipe.model.num_experts)] if is_l0moe else []
    manifests = {}
    for stage in STAGES if is_l0moe else [stage for stage in STAGES if stage not in ONLY_L0MOE]:
        for folder in expert_folders if stage == "experts" else [stage]:
            manifests[folder] = read_json(run / folder / "manifest.json", stage)
    return RunFiles(
        recipe=recipe,
        dense_config=read_json(Path(recipe.model.path) / "config.json", "convert"),
        export_config=read_json(run / "export" / "config.json", "export"),
        ccm=read_json(run / "curate" / "ccm.json", "curate"),
        curate=read_json(run / "curate" / "summary.json", "curate"),
        experts=[
            ExpertFiles(
                metrics=(
                    read_metrics(run / folder / "metrics.jsonl", "experts")
                    if recipe.construction is None
                    else []
                ),
                units=read_units(run / folder / "expert.safetensors"),
            )
            for folder in expert_folders
        ],
        moe_metrics=read_metrics(run / "moe" / "metrics.jsonl", "moe"),
        perplexity=read_json(run / "evaluate" / "perplexity.json", "evaluate"),
        speed=read_json(run / "evaluate" / "speed.json", "evaluate"),
        router_load=_of_evaluate(run, "router_load.json", recipe.method != "dsmoe"),
        open_blocks=_of_evaluate(run, "open_blocks.json", recipe.method == "dsmoe"),
        parity=read_json(run / "evaluate" / "parity.json", "evaluate"),
        benchmarks=_of_evaluate(run, "benchmarks.json", recipe.evaluation.benchmarks is not None),
        gpu_samples=read_gpu_samples(run),
        manifests=manifests,
    )


def _of_evaluate(run: Path, name: str, expected: bool) -> Json:
    return read_json(run / "evaluate" / name, "evaluate") if expected else {}


def read_json(file: Path, stage: str) -> Json:
    """Read a JSON object that `stage` wrote."""
    if not file.is_file():
        raise L0MoEError(f"{file} is missing; run the {stage} stage first.")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise L0MoEError(
            f"{file} is not valid JSON ({error}); remove its folder and run the {stage} stage again."
        ) from error
    if not isinstance(value, dict):
        raise L0MoEError(
            f"{file} must hold a JSON object; remove its folder and run the {stage} stage again."
        )
    return value


def read_metrics(file: Path, stage: str) -> list[Json]:
    """Read metrics.jsonl: one object per training step, at least one."""
    if not file.is_file():
        raise L0MoEError(f"{file} is missing; run the {stage} stage first.")
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise L0MoEError(
                f"{file}:{number} is not valid JSON ({error}); remove its folder and run the {stage} stage again."
            ) from error
    if not rows:
        raise L0MoEError(f"{file} is empty; remove its folder and run the {stage} stage again.")
    return rows


def read_units(file: Path) -> dict[int, npt.NDArray[np.int64]]:
    """Read `layers.{i}.units` of expert.safetensors: int64 [E] for every MoE layer."""
    if not file.is_file():
        raise L0MoEError(f"{file} is missing; run the experts stage first.")
    with safe_open(file, framework="np") as tensors:
        units = {
            int(name.split(".")[1]): np.asarray(tensors.get_tensor(name), dtype=np.int64)
            for name in tensors.keys()  # noqa: SIM118 - safe_open is no mapping
            if name.endswith(".units")
        }
    if not units:
        raise L0MoEError(f"{file} holds no kept units; remove its folder and run the experts stage again.")
    return dict(sorted(units.items()))

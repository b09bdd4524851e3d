"""Read what the stages of a run left behind, without torch; of the samples of GPUs, a few numbers for each stage."""

import itertools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.methods.method import method_of
from megatron_l0moe.recipe.recipe import Recipe
from megatron_l0moe.reports import forms
from megatron_l0moe.runs.stage_folder import unsealed
from megatron_l0moe.runs.stages import spec_of
from megatron_l0moe.runtime.json_files import parse_json, read_json
from megatron_l0moe.sizes.parameters import count_parameters

Json = dict[str, Any]

GAP = 5.0
"""Times the median distance of two samples: what is longer is a pause between two attempts, not work."""
NUMBERS = ("power", "memory", "utilization")


def read_gpu_samples(run: Path) -> Json:
    """Return the numbers of the stages `experts` (all together) and `moe`, each only if it was sampled."""
    found = {}
    for stage, pattern in (("experts", "experts/*/gpu/*.jsonl"), ("moe", "moe/gpu/*.jsonl")):
        files = sorted(run.glob(pattern))
        if files:
            found[stage] = _numbers(files)
    return found


def _numbers(files: Iterable[Path]) -> Json:
    """Put the samples of a stage together; watts, GB (1e9 bytes), percent, kWh."""
    by_gpu: dict[tuple[Path, str], list[Json]] = {}
    unreadable = 0
    for file in files:
        for line in file.read_bytes().splitlines():
            try:
                sample = parse_json(line, str(file), "")
                forms.check(sample, forms.GpuSample, file, "")
            except L0MoEError:  # a job that was killed while it wrote
                unreadable += 1
                continue
            by_gpu.setdefault((file, sample["gpu"]), []).append(sample)
    every = [sample for samples in by_gpu.values() for sample in samples]
    power, memory, utilization = (
        [float(sample[name]) for sample in every if sample.get(name) is not None] for name in NUMBERS
    )
    return {
        "gpus": len({(file.name, gpu) for file, gpu in by_gpu}),
        "samples": len(every),
        "unreadable_lines": unreadable,
        "mean_power": statistics.fmean(power) if power else None,
        "largest_power": max(power, default=None),
        "largest_memory": max(memory) / 1e9 if memory else None,
        "mean_utilization": statistics.fmean(utilization) if utilization else None,
        "energy": sum(_joules(samples) for samples in by_gpu.values()) / 3.6e6 if power else None,
    }


def _joules(samples: list[Json]) -> float:
    """Integrate one GPU's power over the time between its samples, pauses left out."""
    known = sorted((sample["time"], sample["power"]) for sample in samples if sample.get("power") is not None)
    pairs = list(itertools.pairwise(known))
    if not pairs:
        return 0.0
    longest = GAP * statistics.median(end - start for (start, _), (end, _) in pairs)
    total: float = sum(
        (end - start) * (before + after) / 2
        for (start, before), (end, after) in pairs
        if end - start <= longest
    )
    return total


BY_LAYER = ("retention", "active_fraction", "sparsity_loss")
"""What metrics.jsonl holds of each layer."""


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
    """The open blocks of a DSMoE; else empty."""
    parity: Json
    benchmarks: Json
    """Empty where the recipe asks for none."""
    gpu_samples: Json
    """Power, memory and energy by training stage; empty where no GPU was sampled."""
    manifests: dict[str, Json]
    """The manifests by folder inside the run, e.g. `moe` or `experts/003`."""


def collect(recipe: Recipe, run: Path) -> RunFiles:
    """Read the run folder.

    Raises:
        L0MoEError: a file is missing, damaged, or lacks what the report shows; the message names it and the stage to
            run.
    """
    is_l0moe, method = recipe.method == "l0moe", method_of(recipe.method)
    expert_folders = [f"experts/{k:03d}" for k in range(recipe.model.num_experts)] if is_l0moe else []
    manifests = {}
    for stage in spec_of("report", recipe.method).inputs:
        for folder in expert_folders if stage == "experts" else [stage]:
            file = run / folder / "manifest.json"
            form: type[forms.Manifest] = forms.Manifest
            if stage == "experts" and recipe.construction is not None:
                form = forms.ConstructionManifest
            if stage == "export" and method.trains_masks:
                form = forms.MasksManifest
            manifests[folder] = unsealed(read_form(file, stage, form), file, _mend(stage))
    trained = expert_folders if recipe.construction is None else []
    masked = forms.MaskedStep if method.trains_masks else forms.Step
    return RunFiles(
        recipe=recipe,
        dense_config=_read_config(Path(recipe.model.path) / "config.json", "convert", count_parameters),
        export_config=_read_config(
            run / "export" / "config.json",
            "export",
            lambda config: method.exported_counts(config, open_blocks=1.0),
        ),
        ccm=_read_ccm(run / "curate" / "ccm.json"),
        curate=_read_corpus(run / "curate" / "summary.json", recipe.model.num_experts),
        experts=[
            ExpertFiles(
                metrics=(
                    read_metrics(run / folder / "metrics.jsonl", "experts", forms.MaskedStep)
                    if folder in trained
                    else []
                ),
                units=read_units(run / folder / "expert.safetensors"),
            )
            for folder in expert_folders
        ],
        moe_metrics=read_metrics(run / "moe" / "metrics.jsonl", "moe", masked),
        perplexity=_read_perplexity(run / "evaluate" / "perplexity.json", recipe.method),
        speed=_read_speed(run / "evaluate" / "speed.json", recipe.method),
        router_load=_read_shares(run, "router_load.json", forms.Layers) if not method.opens_blocks else {},
        open_blocks=_read_shares(run, "open_blocks.json", forms.OpenBlocks) if method.opens_blocks else {},
        parity=read_form(run / "evaluate" / "parity.json", "evaluate", forms.Parity),
        benchmarks=(
            read_form(run / "evaluate" / "benchmarks.json", "evaluate", forms.Benchmarks)
            if recipe.evaluation.benchmarks is not None
            else {}
        ),
        gpu_samples=read_gpu_samples(run),
        manifests=manifests,
    )


def read_form(file: Path, stage: str, form: Any) -> Json:
    """Read a JSON object of a form of `forms.py` that `stage` wrote."""
    if not file.is_file():
        raise L0MoEError(f"{file} is missing; run the {stage} stage first.")
    value = read_json(file, _mend(stage))
    forms.check(value, form, file, _mend(stage))
    return value


def read_metrics(file: Path, stage: str, form: Any = dict[str, Any]) -> list[Json]:
    """Read metrics.jsonl: one object per training step, at least one."""
    if not file.is_file():
        raise L0MoEError(f"{file} is missing; run the {stage} stage first.")
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        rows.append(parse_json(line, f"{file}:{number}", _mend(stage)))
    if not rows:
        raise L0MoEError(f"{file} is empty; {_mend(stage)}.")
    forms.check(rows, list[form], file, _mend(stage))
    for number, row in enumerate(rows, 1):
        for name in BY_LAYER:
            if (row.get(name) or {}).keys() != (rows[-1].get(name) or {}).keys():
                raise L0MoEError(
                    f"{file}:{number} has {name} of other layers than the last line; {_mend(stage)}."
                )
    return rows


def read_units(file: Path) -> dict[int, npt.NDArray[np.int64]]:
    """Read `layers.{i}.units` of expert.safetensors: int64 [E] for every MoE layer."""
    if not file.is_file():
        raise L0MoEError(f"{file} is missing; run the experts stage first.")
    try:
        with safe_open(file, framework="np") as tensors:
            units = {
                int(name.split(".")[1]): np.asarray(tensors.get_tensor(name), dtype=np.int64)
                for name in tensors.keys()  # noqa: SIM118 - safe_open is no mapping
                if name.endswith(".units")
            }
    except (SafetensorError, ValueError, IndexError, TypeError) as error:
        raise L0MoEError(
            f"{file} is cut short or no file of an expert ({error}); {_mend('experts')}."
        ) from error
    if not units:
        raise L0MoEError(f"{file} holds no kept units; {_mend('experts')}.")
    return dict(sorted(units.items()))


def _mend(stage: str) -> str:
    return f"remove its folder and run the {stage} stage again"


def _read_config(file: Path, stage: str, count: Callable[[Json], object]) -> Json:
    """Read a config.json that parameters can be counted from."""
    config = read_form(file, stage, forms.Config)
    try:
        count(config)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise L0MoEError(
            f"{file} does not describe a model of this method ({error}); {_mend(stage)}."
        ) from error
    return config


def _read_shares(run: Path, name: str, form: Any) -> Json:
    """Read shares by layer and domain: each layer has the same domains, each domain as many shares."""
    file = run / "evaluate" / name
    found = read_form(file, "evaluate", form)
    layers = list(found.get("layers", found).values())
    if (
        len({(*layer, *map(len, layer.values())) for layer in layers}) > 1
        or len({len(x) for x in layers[0].values()}) > 1
    ):
        raise L0MoEError(f"{file} has layers of other domains or sizes than the first; {_mend('evaluate')}.")
    return found


def _read_perplexity(file: Path, method: str) -> Json:
    """Read perplexity.json: a table for each model, all over the same domains and clusters."""
    models = ("dense", "l0moe_untrained", "l0moe") if method == "l0moe" else ("dense", method)
    tables = read_form(file, "evaluate", dict[str, forms.Table])
    groups = ("per_domain", "domain_tokens"), ("per_cluster", "cluster_tokens")
    for name in (*models, *tables):
        if name not in tables:
            raise L0MoEError(f"{file} has no table of {name}; {_mend('evaluate')}.")
        for one, other in groups:
            if not tables[name][one].keys() == tables[name][other].keys() == tables["dense"][one].keys():
                raise L0MoEError(f"{file}: {name} has another {one} than dense; {_mend('evaluate')}.")
    return tables


def _read_speed(file: Path, method: str) -> Json:
    speed = read_form(file, "evaluate", forms.Speed)
    for mode, numbers in speed["details"].items():
        if mode in forms.Modes.model_fields:
            forms.check({mode: numbers.get(method)}, dict[str, forms.Pace], file, _mend("evaluate"))
    return speed


def _read_ccm(file: Path) -> Json:
    ccm = read_form(file, "curate", forms.Ccm)
    rows = len(ccm["d_ds"])
    same = all(len(ccm[name]) == rows for name in ("f1", "f2", "f3", "ccm"))
    if not same or len({len(row) for row in ccm["ccm"]}) > 1 or max(ccm["order"]) > rows:
        raise L0MoEError(f"{file} has lists of lengths that do not fit each other; {_mend('curate')}.")
    return ccm


def _read_corpus(file: Path, clusters: int) -> Json:
    corpus = read_form(file, "curate", forms.Corpus)
    table = corpus["table"]
    if len(table) != len(corpus["domains"]) or any(len(row) != clusters for row in table):
        raise L0MoEError(
            f"{file}: table must have a row for each domain and a column for each of {clusters} clusters; "
            f"{_mend('curate')}."
        )
    return corpus

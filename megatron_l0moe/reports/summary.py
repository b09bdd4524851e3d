"""The summary: every number of a run in one JSON object. The page shows nothing that is not in it.

Measurements of time lie under `speed` and `seconds`, of power under `gpu_samples`, what names the place and date under
`provenance`; `deterministic_part` is the rest, which two runs of one recipe must share.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.methods.method import method_of
from megatron_l0moe.reports.collect import ExpertFiles, Json, RunFiles
from megatron_l0moe.sizes.parameters import count_parameters


def router_numbers(load: Json) -> Json:
    """Return which experts the held-out text was sent to, from evaluate/router_load.json."""
    experts = len(next(iter(next(iter(load.values())).values())))
    return {
        "load": load,
        "mean_load": _mean_load(load),
        "largest_share": _largest_share(load),
        "uniform_share": 1.0 / experts,
    }


def block_numbers(found: Json) -> Json:
    """Return where a DSMoE's blocks are open: means over the layers, and the open share of each layer."""
    layers = found["layers"]
    count = len(next(iter(next(iter(layers.values())).values())))
    return {
        **found,
        "count": count,
        "open_share": found["mean_open"] / count,
        "by_domain": _mean_load(layers),
        "by_layer": {
            layer: {domain: math.fsum(shares) / count for domain, shares in domains.items()}
            for layer, domains in layers.items()
        },
    }


def _mean_load(load: Json) -> Json:
    """Return {domain: [K shares]}, the mean over MoE layers."""
    layers = list(load.values())
    return {
        domain: [
            math.fsum(column) / len(layers)
            for column in zip(*(layer[domain] for layer in layers), strict=True)
        ]
        for domain in layers[0]
    }


def _largest_share(load: Json) -> Json:
    """Return {layer: {domain: share of the busiest expert}}."""
    return {
        layer: {domain: max(shares) for domain, shares in domains.items()} for layer, domains in load.items()
    }


PAPER_TOKENS = 30_000_000_000
"""Tokens that the paper of L0-MoE trains on (section 4.1)."""
CURVE_POINTS = 120
"""A curve of a long training is thinned to so many points."""
LAYER_CURVES = 8
"""Experts whose retention is kept layer by layer."""
TIME_KEYS = ("speed", "seconds", "gpu_samples", "provenance")


def build_summary(files: RunFiles) -> Json:
    """Compute the summary of a run from its files."""
    return {
        "name": files.recipe.name,
        "recipe": files.recipe.model_dump(),
        "perplexity": files.perplexity | {"ratio": _perplexity_ratio(files.perplexity)},
        "speed": files.speed,
        "benchmarks": files.benchmarks,
        "parameters": _parameters(files),
        **(_expert_numbers(files) if files.experts else {}),
        "parity": _parity(files.parity),
        "tokens": _tokens(files),
        "ccm": _ccm(files.ccm),
        "corpus": {key: value for key, value in files.curate.items() if key != "seconds"},
        **({"router": router_numbers(files.router_load)} if files.router_load else {}),
        **({"blocks": block_numbers(files.open_blocks)} if files.open_blocks else {}),
        **({"masks": _masks(files)} if method_of(files.recipe.method).trains_masks else {}),
        "training": {
            "experts": [
                expert_training(k, expert) for k, expert in enumerate(files.experts) if expert.metrics
            ],
            "moe": _loss(files.moe_metrics)
            | {
                name: _curve(files.moe_metrics, name)
                for name in ("balance_loss", "z_loss")
                if name in files.moe_metrics[-1]
            }
            | {
                name: _mean_curve(files.moe_metrics, name)
                for name in ("active_fraction", "sparsity_loss")
                if name in files.moe_metrics[-1]
            },
        },
        "seconds": _seconds(files),
        "gpu_samples": files.gpu_samples,
        "provenance": {folder: _provenance(manifest) for folder, manifest in files.manifests.items()},
    }


def deterministic_part(summary: Json) -> Json:
    """Return the summary without measurements of time and without place and date, at every depth."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(inner) for key, inner in value.items() if key not in TIME_KEYS}
        if isinstance(value, list):
            return [strip(inner) for inner in value]
        return value

    result: Json = strip(summary)
    return result


def mean_pairwise_iou(sets: Sequence[npt.NDArray[np.int64]]) -> float:
    """Return the mean of |A and B| / |A or B| over all pairs; 1 = the same units, 0 = none shared."""
    pairs = list(itertools.combinations(sets, 2))
    return math.fsum(len(np.intersect1d(a, b)) / len(np.union1d(a, b)) for a, b in pairs) / len(pairs)


def chance_iou(width: int, channels: int) -> float:
    """Return the IoU at the expected overlap of two random choices of `width` out of `channels` units, r/(2-r)."""
    fraction = width / channels
    return fraction / (2.0 - fraction)


def thin(count: int, limit: int = CURVE_POINTS) -> list[int]:
    """Return at most `limit` indices out of `count`, evenly spread, with the first and the last."""
    if count <= limit:
        return list(range(count))
    return [round(i * (count - 1) / (limit - 1)) for i in range(limit)]


def _perplexity_ratio(perplexity: Json) -> Json:
    dense = perplexity["dense"]
    ratios: Json = {}
    for name, table in perplexity.items():
        if name == "dense":
            continue
        ratios[name] = {"overall": table["overall"] / dense["overall"]} | {
            group: {key: value / dense[group][key] for key, value in table[group].items()}
            for group in ("per_domain", "per_cluster")
        }
    return ratios


def _parameters(files: RunFiles) -> Json:
    dense = count_parameters(files.dense_config)
    method = method_of(files.recipe.method)
    moe = method.exported_counts(files.export_config, files.open_blocks.get("mean_open"))
    return {
        "dense": dense.total,
        "dense_active": dense.active,
        "total": moe.total,
        "active": moe.active,
        "experts": moe.experts,
        "routers": moe.routers,
        "active_share": moe.active / dense.active,
        "distinct_experts_of_8_tokens": moe.distinct_experts(8),
    }


def _expert_numbers(files: RunFiles) -> Json:
    overlap = experts_overlap(
        files.experts,
        width=files.recipe.model.expert_ffn,
        channels=files.dense_config["intermediate_size"],
    )
    return {"experts": overlap, "construction": _construction(files)}


def experts_overlap(experts: Sequence[ExpertFiles], *, width: int, channels: int) -> Json:
    """Return how far the units of two or more experts of `width` out of `channels` are the same, by layer."""
    widths = {layer: sorted({len(expert.units[layer]) for expert in experts}) for layer in experts[0].units}
    for layer, found in widths.items():
        if found != [width]:
            raise L0MoEError(
                f"The experts of layer {layer} have the widths {found}, the recipe says model.expert_ffn = "
                f"{width}; remove the experts folder and run the experts stage again."
            )
    iou = {str(layer): mean_pairwise_iou([expert.units[layer] for expert in experts]) for layer in widths}
    return {
        "count": len(experts),
        "dense_width": channels,
        "kept_fraction": width / channels,
        "width_per_layer": {str(layer): found[0] for layer, found in widths.items()},
        "iou": iou,
        "iou_mean": math.fsum(iou.values()) / len(iou),
        "iou_chance": chance_iou(width, channels),
    }


def _construction(files: RunFiles) -> Json:
    """Say how the experts were made; without training, the numbers of each calibration pass."""
    method = files.recipe.expert_training.method
    if method == "l0":
        return {"method": method}
    numbers = [files.manifests[f"experts/{k:03d}"].get("numbers", {}) for k in range(len(files.experts))]
    return {
        "method": method,
        "calibration_tokens": sum(int(row["calibration_tokens"]) for row in numbers),
        "layers": [row["layers"] for row in numbers],
        "calibration_loss": [row["calibration_loss"] for row in numbers],
    }


def _parity(parity: Json) -> Json:
    near_ties = parity.get("near_ties", [])
    return {
        "megatron_vs_hf_max_abs": parity["max_abs"],
        "positions": parity["positions"],
        "near_ties": near_ties,
        "near_tie_count": len(near_ties),
        **{name: parity[name] for name in ("median_abs", "tolerance") if name in parity},
    }


def _tokens(files: RunFiles) -> Json:
    runs = [int(expert.metrics[-1]["tokens"]) for expert in files.experts if expert.metrics]
    moe = int(files.moe_metrics[-1]["tokens"])
    total = sum(runs) + moe
    tokens: Json = {"expert": sum(runs), "expert_runs": runs, "moe": moe, "total": total}
    if files.recipe.method == "l0moe":
        tokens |= {"paper": PAPER_TOKENS, "percent_of_paper": 100.0 * total / PAPER_TOKENS}
    return tokens


def _ccm(ccm: Json) -> Json:
    """Add what the page shows: the sets in training order, with the means of eq. 4's terms over the clusters."""
    rows = []
    for number in ccm["order"]:
        row = number - 1
        means = {
            f"mean_{term}": math.fsum(ccm[term][row]) / len(ccm[term][row]) for term in ("f1", "f2", "f3")
        }
        rows.append({"iteration": number, "d_ds": ccm["d_ds"][row], "ccm": ccm["ccm"][row], **means})
    return ccm | {"in_training_order": rows}


def _masks(files: RunFiles) -> Json:
    """Return the activated fraction of a Mixture-of-Masks over the steps, and what its export made of the units."""
    numbers = files.manifests["export"]["numbers"]
    exported = {name: numbers[name] for name in ("expert_ffn", "num_shared_experts", "units")}
    width, shared = numbers["expert_ffn"], numbers["num_shared_experts"]
    return {
        "run": _masked_run(files.moe_metrics, with_layers=True),
        **exported,
        "computed": (files.export_config["moe_k"] + shared) * width,
        "dense_width": files.dense_config["intermediate_size"],
    }


def expert_training(k: int, expert: ExpertFiles) -> Json:
    """Return loss and retention of the k-th expert run; retention by layer for the first experts only."""
    return _masked_run(expert.metrics, with_layers=k < LAYER_CURVES)


def _masked_run(rows: Sequence[Json], *, with_layers: bool) -> Json:
    """Return losses and retention of a training with L0 masks."""
    result = _loss(rows)
    layers = rows[-1]["retention"]
    result["retention"] = {
        "mean": _series(rows, [math.fsum(row["retention"].values()) / len(row["retention"]) for row in rows]),
        "target": _curve(rows, "retention_target"),
        "last": layers,
    }
    if with_layers:
        result["retention"]["layers"] = {
            layer: _series(rows, [row["retention"][layer] for row in rows]) for layer in layers
        }
    result["frozen_from"] = next((row["iteration"] for row in rows if row.get("frozen")), None)
    return result


def _loss(rows: Sequence[Json]) -> Json:
    losses = [row["lm_loss"] for row in rows]
    tenth = max(len(rows) // 10, 1)
    return {
        "steps": rows[-1]["iteration"],
        "tokens": rows[-1]["tokens"],
        "step": _series(rows, [row["iteration"] for row in rows]),
        "lm_loss": _series(rows, losses),
        "first_loss": math.fsum(losses[:tenth]) / tenth,
        "last_loss": math.fsum(losses[-tenth:]) / tenth,
    }


def _curve(rows: Sequence[Json], name: str) -> list[Any]:
    return _series(rows, [row.get(name) for row in rows])


def _mean_curve(rows: Sequence[Json], name: str) -> list[Any]:
    """Return the curve of a value that is logged by layer, mean over the layers."""
    return _series(rows, [math.fsum(row[name].values()) / len(row[name]) for row in rows])


def _series(rows: Sequence[Json], values: Sequence[Any]) -> list[Any]:
    return [values[index] for index in thin(len(rows))]


def _seconds(files: RunFiles) -> Json:
    def spent(rows: Iterable[Json]) -> float:
        return math.fsum(float(row["seconds"]) for row in rows)

    constructed = [
        files.manifests[f"experts/{k:03d}"].get("numbers", {}).get("seconds", 0.0)
        for k in range(len(files.experts))
    ]
    seconds: Json = {
        "experts": [
            spent(expert.metrics) if expert.metrics else constructed[k]
            for k, expert in enumerate(files.experts)
        ],
        "moe": spent(files.moe_metrics),
    }
    if "seconds" in files.curate:
        seconds["curate"] = files.curate["seconds"]
    evaluate = files.manifests["evaluate"].get("numbers", {})
    if "seconds" in evaluate:
        seconds["evaluate"] = evaluate["seconds"]
    return seconds


def _provenance(manifest: Json) -> Json:
    machine = manifest.get("machine", {})
    return {
        "config_hash": manifest.get("config_hash"),
        "command": " ".join(str(word) for word in manifest.get("command", [])),
        "commit": manifest.get("commit"),
        "finished": manifest.get("finished"),
        "platform": machine.get("platform"),
        "cpus": machine.get("cpus"),
        "versions": manifest.get("versions", {}),
    }

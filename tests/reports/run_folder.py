"""A small, complete, made-up run folder: every file that the report reads, with numbers that can be checked."""

import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from megatron_l0moe.recipe.recipe import Recipe

K, FFN, WIDTH, LAYERS, DENSE_LAYERS, STEPS = 4, 32, 8, 6, 2, 40
DOMAINS = ["code_c", "docs/sql", "novel", "very_long_domain_name_of_a_source"]
MOE_LAYERS = range(DENSE_LAYERS, LAYERS)
STAGES = [
    "convert",
    "curate",
    *(f"experts/{k:03d}" for k in range(K)),
    "assemble",
    "moe",
    "export",
    "evaluate",
]


def make_recipe(root: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "made-up",
            "model": {
                "path": str(root / "dense"),
                "dense_layers": DENSE_LAYERS,
                "num_experts": K,
                "expert_ffn": WIDTH,
            },
            "data": {
                "corpus": "corpus",
                "embedding_model": "encoder",
                "iterations": 4,
                "seq_length": 64,
                "tokens_per_expert": 5120,
                "tokens_per_set": 5120,
            },
        }
    )


def build_run(root: Path) -> tuple[Recipe, Path]:
    """Write the dense config and the run folder under `root`; return the recipe and the run folder."""
    recipe, run = make_recipe(root), root / "runs" / "made-up"
    sizes = {
        "vocab_size": 256,
        "hidden_size": 16,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    _write(root / "dense" / "config.json", sizes | {"model_type": "llama"})
    moe = {
        "model_type": "ernie4_5_moe",
        "moe_intermediate_size": WIDTH,
        "moe_num_experts": K,
        "moe_k": 2,
        "moe_num_shared_experts": 0,
        "moe_layer_start_index": DENSE_LAYERS,
        "moe_layer_end_index": LAYERS - 1,
    }
    _write(run / "export" / "config.json", sizes | moe)
    _curate(run / "curate")
    for k in range(K):
        _expert(run / "experts" / f"{k:03d}", k)
    _metrics(
        run / "moe", [_step(i, 4.0) | {"balance_loss": 1 + 1 / i, "z_loss": 0.1} for i in range(1, STEPS + 1)]
    )
    _evaluate(run / "evaluate")
    for folder in STAGES:
        _write(
            run / folder / "manifest.json",
            {
                "config_hash": "0123456789abcdef",
                "command": ["l0moe", folder.split("/")[0], "recipe.yaml"],
                "commit": "c0ffee",
                "versions": {"torch": "2.14.1"},
                "machine": {"host": "secret-host", "platform": "Linux", "cpus": 2},
                "finished": "2026-11-21T12:00:00+00:00",
                "numbers": {"seconds": {"speed": 12.5}},
            },
        )
    return recipe, run


def _curate(folder: Path) -> None:
    rng = np.random.default_rng(0)
    ccm = rng.uniform(0.35, 0.45, (3, K)).round(4).tolist()
    distances = [max(row) + 0.5 / K * math.fsum(row) for row in ccm]
    order = sorted(range(1, 4), key=lambda number: distances[number - 1])
    _write(
        folder / "ccm.json",
        {
            "f1": ccm,
            "f2": [[value + 1 for value in row] for row in ccm],
            "f3": [[value / 9 for value in row] for row in ccm],
            "ccm": ccm,
            "d_ds": distances,
            "order": order,
            "ordering": "ascending",
            "beta": 0.5,
            "delta": 0.1,
        },
    )
    _write(
        folder / "summary.json",
        {
            "documents": {"corpus": 900, "training": 400},
            "dropped": {"exact repetition": 3},
            "domains": DOMAINS,
            "table": [[120, 3, 0, 1], [2, 77, 30, 0], [0, 1, 99, 4], [5, 0, 0, 60]],
            "order": order,
            "d_ds": distances,
            "seconds": {"embed": 21.5},
        },
    )


def _expert(folder: Path, k: int) -> None:
    rows = []
    for i in range(1, STEPS + 1):
        target = max(1.0 - 1.5 * i / STEPS, WIDTH / FFN)
        rows.append(
            _step(i, 5.0 + 0.1 * k)
            | {
                "retention_target": target,
                "retention": {str(layer): target + 0.02 * math.sin(i + layer) for layer in MOE_LAYERS},
                "frozen": i > 0.9 * STEPS,
            }
        )
    _metrics(folder, rows)
    # Neighbours share half of their units: IoU is 4/12 for 4 of the 6 pairs, 0 for the others.
    units = np.sort((np.arange(WIDTH) + k * WIDTH // 2) % (K * WIDTH // 2)).astype(np.int64)
    save_file({f"layers.{layer}.units": units for layer in MOE_LAYERS}, folder / "expert.safetensors")


def _evaluate(folder: Path) -> None:
    perplexity = {}
    for name, factor in (("dense", 1.0), ("l0moe_untrained", 3.0), ("l0moe", 1.5)):
        per_domain = {domain: factor * (10.0 + i) for i, domain in enumerate(DOMAINS)}
        if name == "l0moe":
            per_domain["novel"] = 9.0  # better than dense
        perplexity[name] = {
            "overall": 12.0 * factor,
            "per_domain": per_domain,
            "per_cluster": {str(k): factor * (9.0 + k) for k in range(K)},
            "tokens": 4096,
            "domain_tokens": dict.fromkeys(DOMAINS, 1024),
            "cluster_tokens": {str(k): 1024 for k in range(K)},
        }
    _write(folder / "perplexity.json", perplexity)
    load = {
        str(layer): {
            domain: [0.4, 0.3, 0.2, 0.1][i:] + [0.4, 0.3, 0.2, 0.1][:i] for i, domain in enumerate(DOMAINS)
        }
        for layer in MOE_LAYERS
    }
    _write(folder / "router_load.json", load)
    _write(
        folder / "parity.json",
        {"max_abs": 3.1e-6, "positions": 64, "near_ties": [{"position": 63, "layer": 3}]},
    )
    _write(folder / "speed.json", _speed())


def _speed() -> dict[str, object]:
    details, bounds = {}, {"prefill": 1.31, "decode_b1": 1.31, "decode_b8": 1.0}
    medians = {"prefill": 1.17, "decode_b1": 1.04, "decode_b8": 1.02}
    for mode, median in medians.items():
        model = {"seconds": {"median": 0.5, "min": 0.4, "max": 0.7, "iqr": 0.1}, "tokens_per_second": 1234.5}
        details[mode] = {
            "batch": 8 if mode.endswith("8") else 1,
            "tokens": 512,
            "dense": model,
            "l0moe": model,
            "ratio": {
                "median": median,
                "min": median - 0.1,
                "max": median + 0.2,
                "iqr": 0.05,
                "pairs": [median],
            },
            "bound": bounds[mode],
        }
    return {
        **{f"{mode}_ratio": median for mode, median in medians.items()},
        "bounds": bounds,
        "details": details,
        "settings": {
            "dtype": "float32",
            "experts_implementation": "grouped_mm",
            "repeats": 5,
            "prompt_tokens": 32,
        },
        "hardware": {
            "cpu": "Some CPU",
            "cores": 2,
            "device": "cpu",
            "threads": 1,
            "versions": {"torch": "2.14.1", "transformers": "5.23.0"},
            "date": "2026-11-21T12:00:00+00:00",
        },
    }


def _step(i: int, loss: float) -> dict[str, object]:
    return {
        "iteration": i,
        "consumed_samples": 2 * i,
        "tokens": 128 * i,
        "lm_loss": loss - 2 * i / STEPS + 0.1 * math.sin(3 * i),
        "grad_norm": None,
        "learning_rate": 1e-3,
        "seconds": 0.5,
    }


def _metrics(folder: Path, rows: list[dict[str, object]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write(file: Path, value: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))

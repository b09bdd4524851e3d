"""The tiny models that planning_measure.py measures and tests/planning compares with the formulas."""

from typing import Any

SIZES: dict[str, int] = {
    "layers": 4,
    "dense": 1,
    "hidden": 64,
    "ffn": 192,
    "heads": 4,
    "vocab": 128,
    "experts": 8,
    "expert_ffn": 32,
    "top_k": 2,
    "sequence": 64,
    "batch": 2,
}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CASES: dict[str, dict[str, Any]] = {
    "expert": {"stage": "expert"},
    "expert_masks_only": {"stage": "expert", "trains": "off"},
    "expert_recomputed": {
        "stage": "expert",
        "recompute": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    },
    "expert_full": {"stage": "expert", "recompute": FULL},
    "expert_bf16": {"stage": "expert", "bf16": True},
    "moe": {"stage": "moe"},
    "moe_full": {"stage": "moe", "recompute": FULL},
    "moe_recomputed": {
        "stage": "moe",
        "recompute": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    },
    "moe_bf16": {"stage": "moe", "bf16": True},
    "moe_untied": {"stage": "moe", "tied": False},
}

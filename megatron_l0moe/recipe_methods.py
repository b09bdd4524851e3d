"""`method` of a recipe: the sections of the methods beside L0-MoE, and the keys that mean nothing to them."""

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_l0moe.recipe_sections import (
    MOST,
    EvaluationSection,
    ExpertTrainingSection,
    ExportSection,
    ModelSection,
    MoETrainingSection,
    RecipePart,
)

ModelMethod = Literal["l0moe", "dsmoe", "mom"]
TITLES: dict[ModelMethod, str] = {"l0moe": "L0-MoE", "dsmoe": "DSMoE", "mom": "Mixture-of-Masks"}
"""What people call the models."""
SECTIONS_OF_METHODS = ("dsmoe", "mom")
"""Sections that have the name of the one method that they belong to."""
MOST_SETS = 512
"""Of masks that the training job can count; a test compares it with the job's own."""
SHARED_EXPERT_KEYS = frozenset({"global_batch_size"})
"""Of expert_training, what curate reads too: it cuts the set that the order of the others is measured from."""
_SECTIONS: dict[str, type[RecipePart]] = {
    "model": ModelSection,
    "expert_training": ExpertTrainingSection,
    "moe_training": MoETrainingSection,
    "export": ExportSection,
    "evaluation": EvaluationSection,
}


class DSMoESection(RecipePart):
    """Blocks and gates of DSMoE (docs/methods.md); the rate of the gates is moe_training.router_learning_rate."""

    blocks: int = Field(default=8, ge=2, le=MOST)
    """n: contiguous blocks of equal width into which the FFN of each layer above model.dense_layers is cut."""
    threshold: float = Field(default=0.5, ge=0, lt=1)
    """tau of eq. 7: a block opens where its score is above it. How many open is an outcome of training."""
    sparsity_coefficient: float = Field(default=1.0, ge=0)
    """Weight of the L1 loss of eq. 17-19."""


class MoMSection(RecipePart):
    """Masks of Mixture-of-Masks (docs/methods.md); the rate of its routers is moe_training.router_learning_rate."""

    masks: int = Field(default=8, ge=3, le=MOST_SETS)
    """E: masks over the channels of the FFN of each layer above model.dense_layers."""
    top_k: int = Field(default=2, ge=2)
    """k: masks that a token uses; the softmax over one alone is 1, and no router learns from that."""
    target: float = Field(default=0.5, gt=0, lt=1)
    """Fraction of a layer's FFN channels that a token uses at the end, mean over tokens."""
    balance_coefficient: float = Field(default=0.01, ge=0)
    """Weight of the balance loss of the mask routers."""
    mask_learning_rate: float = Field(default=0.3, gt=0)

    @model_validator(mode="after")
    def _check(self) -> "MoMSection":
        if self.top_k >= self.masks:
            raise ValueError(f"top_k ({self.top_k}) must be below masks ({self.masks})")
        sets = math.comb(self.masks, self.top_k)
        if sets > MOST_SETS:
            raise ValueError(
                f"masks ({self.masks}) by top_k ({self.top_k}) make {sets} sets of masks, which must be at most "
                f"{MOST_SETS}; use fewer masks"
            )
        return self


def only_l0moe() -> list[tuple[str, str]]:
    """Return the keys, by section, that belong to method l0moe alone."""
    experts = [("expert_training", key) for key in ExpertTrainingSection.model_fields]
    others = [("model", "expert_ffn"), ("model", "top_k"), ("export", "target"), ("evaluation", "benchmarks")]
    others.append(("moe_training", "router_init"))
    return [*others, *(pair for pair in experts if pair[1] not in SHARED_EXPERT_KEYS)]


def misplaced_key(method: ModelMethod, sections: dict[str, RecipePart]) -> str | None:
    """Return why a key that is set to something other than its default does not belong to the method, or None.

    Args:
        sections: the recipe's, by name.
    """
    for name in SECTIONS_OF_METHODS:
        if name != method and sections[name] != type(sections[name])():
            return f"the section {name} is of method {name}, but method is {method}; remove it, or set method to {name}"
    if method == "l0moe":
        return None
    for section, key in only_l0moe():
        default: Any = _SECTIONS[section].model_fields[key].get_default(call_default_factory=True)
        if getattr(sections[section], key) != default:
            return f"{section}.{key} is of method l0moe, but method is {method}; remove it"
    return None

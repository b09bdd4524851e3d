"""`layouts` and `gpus` of a recipe: what changes with the number of GPUs, and which number it is.

A block holds only what does not change a stage's result, so a run may go on on another number of GPUs. It is put into
the training sections when the recipe is loaded; after that a recipe with layouts is like one without.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from megatron_l0moe.recipe_sections import MOST_EXPERTS, Flags, ParallelSection, RecipePart

FREE_FLAGS = ("recompute-", "save-retain-interval")
"""Beginnings of Megatron's flags that change memory, time or disk and not the result: no part of a stage's settings."""
RECOMPUTATION = "recompute-"


def _check_recomputation(flags: Flags) -> Flags:
    for name in flags:
        if not name.startswith(RECOMPUTATION):
            raise ValueError(
                f"flag {name!r} is none of recomputation, and no other may change with the number of GPUs; write it "
                "into the training section"
            )
    return flags


class JobLayout(RecipePart):
    """What a training job takes on so many GPUs."""

    parallel: ParallelSection
    flags: Annotated[Flags, AfterValidator(_check_recomputation)] = Field(default_factory=dict)
    """Those of recomputation, `recompute-...`, on top of the section's flags."""

    def section_keys(self) -> dict[str, Any]:
        """Return the keys that it sets in the training section, without `flags`."""
        return self.model_dump(exclude={"flags"})


class ExpertJobLayout(JobLayout):
    """The same for the expert stage."""

    at_once: int = Field(default=1, ge=1, le=MOST_EXPERTS)


class LayoutBlock(RecipePart):
    """The layouts of both stages on so many GPUs, as `l0moe plan RECIPE --gpus N` prints them."""

    expert_training: ExpertJobLayout
    moe_training: JobLayout


def with_block(raw: dict[str, Any], gpus: int, block: LayoutBlock) -> dict[str, Any]:
    """Return a recipe's keys with those of the block for so many GPUs in its training sections.

    Raises:
        ValueError: the block takes more GPUs, or a section has such a key itself.
    """
    merged = dict(raw)
    for name, job in (("expert_training", block.expert_training), ("moe_training", block.moe_training)):
        if job.parallel.processes > gpus:
            raise ValueError(
                f"layouts.{gpus}.{name}.parallel.processes ({job.parallel.processes}) must be at most {gpus}, the "
                "number of GPUs"
            )
        section = raw.get(name, {})
        flags = section.get("flags", {})
        twice = [f"{name}.{key}" for key in job.section_keys() if key in section]
        twice += [f"{name}.flags.{key}" for key in flags if key.startswith(RECOMPUTATION)]
        if twice:
            raise ValueError(
                f"{twice[0]} may not stand beside layouts, which say it for each number of GPUs; remove it"
            )
        merged[name] = section | job.section_keys() | {"flags": flags | job.flags}
    return merged

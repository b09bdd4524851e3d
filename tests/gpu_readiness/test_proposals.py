"""The fastest layouts that `l0moe plan` proposes, and the leanest, through Megatron's own parser and checks.

No GPU is used: flags are completed as on a machine with CUDA and Transformer Engine (a fake one).
"""

from pathlib import Path
from typing import Any

import pytest
from gpu_readiness.models_7b import CONFIGS, EXAMPLES, architecture
from gpu_readiness.models_7b import GPUS as SIZES
from gpu_readiness.test_flags import differences, resolve

from megatron_l0moe.chain import training_commands
from megatron_l0moe.plan.plan import make_plan, recipe_keys
from megatron_l0moe.plan.proposals import Candidate
from megatron_l0moe.recipe.recipe import Recipe, Section, load_recipe
from megatron_l0moe.runs.stages import Run
from megatron_l0moe.sizes.gpu_models import GPUS

pytestmark = pytest.mark.slow  # most cases start a process with Megatron


def proposals(name: str) -> list[tuple[Section, Candidate]]:
    """Return of each stage and number of GPUs the fastest layout and that with the least memory."""
    found: list[tuple[Section, Candidate]] = []
    for gpus in SIZES:
        for stage in make_plan(load_recipe(EXAMPLES / f"{name}.yaml"), gpu=GPUS["h100"], gpus=gpus).stages:
            assert stage.proposals is not None
            fitting = stage.proposals.fitting
            leanest = min(fitting, key=lambda one: one.memory.total)
            found += [(stage.section, one) for one in dict.fromkeys((fitting[0], leanest))]
    return found


def flags_of(name: str, section: Section, candidate: Candidate) -> list[str]:
    """Return the flags of the training program with a proposed layout."""
    raw = load_recipe(EXAMPLES / f"{name}.yaml").model_dump()
    keys = recipe_keys(candidate)
    raw[section] |= keys | {"flags": raw[section]["flags"] | keys.get("flags", {})}
    run = Run(recipe=Recipe.model_validate(raw), recipe_file=EXAMPLES / f"{name}.yaml", runs_dir=Path("runs"))
    model = architecture(name)
    job = (
        training_commands.moe_job(run, model)
        if section == "moe_training"
        else training_commands.expert_job(run, model, 0)
    )
    return job.command[job.command.index(training_commands.PRETRAIN) + 1 :]


@pytest.mark.parametrize("name", CONFIGS)
def test_megatron_accepts_them(name: str) -> None:
    cases = proposals(name)
    found = resolve("te", [(one.layout.processes, flags_of(name, section, one)) for section, one in cases])
    for (_, one), result in zip(cases, found, strict=True):
        layout = one.layout
        expected: dict[str, Any] = {
            "world_size": layout.processes,
            "tensor_model_parallel_size": layout.tensor,
            "pipeline_model_parallel_size": layout.pipeline,
            "expert_model_parallel_size": layout.expert,
            "data_parallel_size": layout.data,
            "sequence_parallel": layout.tensor > 1,
            "recompute_granularity": None
            if one.recompute.granularity == "none"
            else one.recompute.granularity,
            "ddp.use_distributed_optimizer": True,
        }
        assert differences(result, expected) == {}
        assert differences(result, {"world_size": layout.processes + 1})  # control

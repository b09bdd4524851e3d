"""The recipe: one YAML file that describes a whole run, validated strictly, frozen after loading.

Unknown keys, wrong types and sizes that do not fit each other stop here, before anything is computed.
Relative paths in a recipe are relative to the folder that the command is run in.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from megatron_l0moe.errors import L0MoEError, nearest
from megatron_l0moe.planning.layout_rules import JobSizes, refusal
from megatron_l0moe.recipe_sections import (
    DataSection,
    EvaluationSection,
    ExpertTrainingSection,
    ExportSection,
    ModelSection,
    MoETrainingSection,
    ParallelSection,
    RecipePart,
)

Section = Literal["expert_training", "moe_training"]
SECTIONS: tuple[Section, ...] = ("expert_training", "moe_training")


class Recipe(RecipePart):
    """A whole run, from a dense checkpoint and a corpus to an exported L0-MoE and its report."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's name; everything it writes lies under runs/NAME/."""
    seed: int = 1234
    model: ModelSection
    data: DataSection
    expert_training: ExpertTrainingSection = ExpertTrainingSection()
    moe_training: MoETrainingSection = MoETrainingSection()
    export: ExportSection = ExportSection()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        k = self.model.num_experts
        if self.model.top_k > k:
            raise ValueError(f"model.top_k ({self.model.top_k}) must be at most model.num_experts ({k})")
        for section in SECTIONS:
            parallel = self.parallel(section)
            if found := refusal(parallel.layout, self.job_sizes(section), layout_names(section)):
                raise ValueError(found)
            if parallel.processes % parallel.nodes:
                raise ValueError(
                    f"{section}.parallel.processes ({parallel.processes}) must be divisible by "
                    f"{section}.parallel.nodes ({parallel.nodes})"
                )
        if self.data.batches == "random" and self.data.rotate:
            raise ValueError(
                "data.rotate is true, but data.batches random has no rounds to rotate; remove data.rotate, or set "
                "data.batches to balanced"
            )
        self._check_budgets()
        return self

    def parallel(self, section: Section) -> ParallelSection:
        """Return the layout's keys of a training section."""
        return self.expert_training.parallel if section == "expert_training" else self.moe_training.parallel

    def job_sizes(self, section: Section) -> JobSizes:
        """Return what a layout has to divide, as far as the recipe knows it without the model."""
        is_moe = section == "moe_training"
        return JobSizes(
            experts=self.model.num_experts if is_moe else 0,
            expert_ffn=self.model.expert_ffn if is_moe else None,
            seq_length=self.data.seq_length,
            micro_batch=(self.moe_training if is_moe else self.expert_training).micro_batch_size,
            global_batch=self.moe_global_batch_size if is_moe else self.expert_training.global_batch_size,
        )

    def _check_budgets(self) -> None:
        length = self.data.seq_length
        expert_step = length * self.expert_training.global_batch_size
        moe_step = length * self.moe_global_batch_size
        for key, tokens, step in (
            ("data.tokens_per_expert", self.data.tokens_per_expert, expert_step),
            ("data.tokens_per_set", self.data.tokens_per_set, moe_step),
            ("data.include_initial_tokens", self.data.include_initial_tokens or moe_step, moe_step),
        ):
            if tokens < step:
                raise ValueError(
                    f"{key} ({tokens}) must be at least one training step, which takes {step} tokens "
                    "(seq_length * global batch)"
                )

    @property
    def moe_global_batch_size(self) -> int:
        """Sequences of one MoE training step: p * K."""
        return self.moe_training.sequences_per_domain * self.model.num_experts

    @property
    def expert_steps(self) -> int:
        """Optimizer steps of one expert run."""
        return self.data.tokens_per_expert // (self.data.seq_length * self.expert_training.global_batch_size)

    @property
    def calibration_sequences(self) -> int:
        """Sequences of one calibration pass: whole ones, at least one, and no more than an expert's domain has."""
        wanted = min(self.expert_training.calibration.tokens, self.data.tokens_per_expert)
        return max(wanted // self.data.seq_length, 1)

    @property
    def construction(self) -> dict[str, Any] | None:
        """What experts that are made without training depend on; None where they are trained."""
        training = self.expert_training
        if training.method == "l0":
            return None
        settings: dict[str, Any] = {"method": training.method, "sequences": self.calibration_sequences}
        if training.method in ("obs", "svd"):
            settings["damping"] = training.calibration.damping
        if training.method == "coactivation":
            settings |= {"shared": training.calibration.shared, "top_k": self.model.top_k}
        return settings

    @property
    def moe_steps(self) -> int:
        """Optimizer steps of MoE training: whole global batches of every set."""
        batch = self.moe_global_batch_size * self.data.seq_length
        sets = [self.data.tokens_per_set] * (self.data.iterations - 1)
        if self.data.include_initial_tokens:
            sets.append(self.data.include_initial_tokens)
        return sum(tokens // batch for tokens in sets)


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: `1e-4` is a number, and a key that is written twice is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _unique_keys(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for position, key in enumerate(keys):
        if key in keys[:position]:
            line = node.value[position][0].start_mark.line + 1
            raise L0MoEError(f"the key {key!r} is there twice (line {line}); remove one of the two")
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_keys)


def load_recipe(path: str | Path) -> Recipe:
    """Read and validate a recipe.

    Raises:
        L0MoEError: the file is missing, is not YAML, or breaks a rule; the message names the key.
    """
    file = Path(path)
    if not file.is_file():
        raise L0MoEError(f"Recipe {file} does not exist; see examples/ for recipes to start from.")
    try:
        raw = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise L0MoEError(f"Recipe {file} is not valid YAML: {' '.join(str(error).split())}.") from error
    except L0MoEError as error:
        raise L0MoEError(f"Recipe {file}: {error}.") from error
    if not isinstance(raw, dict):
        raise L0MoEError(f"Recipe {file} must be a mapping with the keys {', '.join(Recipe.model_fields)}.")
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise L0MoEError(f"Recipe {file}: {_first_problem(error)}.") from error


def layout_names(section: Section) -> dict[str, str]:
    """Return how messages about a layout call each number of a recipe."""
    batch = "sequences_per_domain * num_experts" if section == "moe_training" else "global_batch_size"
    return {
        **{key: f"{section}.parallel.{key}" for key in ParallelSection.model_fields},
        "experts": "model.num_experts",
        "expert_ffn": "model.expert_ffn",
        "seq_length": "data.seq_length",
        "micro_batch": "micro_batch_size",
        "global_batch": f"{section}.{batch}",
    }


def section_hash(*parts: Any) -> str:
    """Return the sha256 (first 16 hex digits) of settings, independent of the order of keys."""
    plain = [part.model_dump() if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _first_problem(error: ValidationError) -> str:
    """Word the first problem as one clause: unknown keys first, since they often explain a missing one."""
    problems = error.errors()
    unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    problem = (unknown or problems)[0]
    location = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        key = location[-1]
        return f"unknown key {'.'.join(location)!r}{nearest(key, _keys_at(location[:-1]))}"
    if "flags" in location[:-1]:
        name = ".".join(location[: location.index("flags") + 2])
        return f"{name} must be true, a number or text, got {problem['input']!r}"
    if problem["type"] == "missing":
        return f"the key {'.'.join(location)!r} is required"
    if problem["type"] == "string_pattern_mismatch":
        return (
            f"{'.'.join(location)} may hold letters, digits, '.', '_' and '-' only, got {problem['input']!r}"
        )
    message = problem["msg"].removeprefix("Value error, ")
    return f"{'.'.join(location)}: {message}, got {problem['input']!r}" if location else message


def _keys_at(location: list[str]) -> list[str]:
    section: Any = Recipe
    for part in location:
        # the other kind is a mapping from names to sections
        is_section = hasattr(section, "model_fields")
        section = section.model_fields[part].annotation if is_section else get_args(section)[1]
    return list(section.model_fields)

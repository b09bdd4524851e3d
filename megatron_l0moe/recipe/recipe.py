"""The recipe: one YAML file that describes a whole run, validated strictly, frozen after loading.

Unknown keys, wrong types and sizes that do not fit each other stop here, before anything is computed.
Relative paths in a recipe are relative to the folder that the command is run in. A `method` other than l0moe has a
section of its own, and keys that mean nothing to it are refused.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from megatron_l0moe.recipe.layout import (
    MOST,
    Flags,
    LayoutBlock,
    ParallelSection,
    Processes,
    RecipePart,
    with_block,
)
from megatron_l0moe.recipe.layout_rules import JobSizes, refusal
from megatron_l0moe.recipe.sections import (
    DataSection,
    Dtype,
    EvaluationSection,
    ExpertTrainingSection,
    ExportSection,
    ModelSection,
    MoETrainingSection,
    RouterInit,
)
from megatron_l0moe.recipe.yaml_file import LONGEST_NAME, first_problem, load_settings

ModelMethod = Literal["l0moe", "dsmoe", "mom"]
TITLES: dict[ModelMethod, str] = {"l0moe": "L0-MoE", "dsmoe": "DSMoE", "mom": "Mixture-of-Masks"}
"""What people call the models."""
SECTIONS_OF_METHODS = ("dsmoe", "mom")
"""Sections that have the name of the one method that they belong to."""
MOST_SETS = 512
"""The most sets of masks that the training job can count; a test compares it with the job's own."""
SHARED_EXPERT_KEYS = frozenset({"global_batch_size"})
"""The keys of expert_training that curate reads too: it cuts the set that the order of the others is measured from."""
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


DtypeChoice = Literal["auto", Dtype]
Section = Literal["expert_training", "moe_training"]
SECTIONS: tuple[Section, ...] = ("expert_training", "moe_training")
DTYPE_FLAGS = {"bfloat16": "bf16"}
"""Megatron's flag of a dtype; it trains in float32 without one."""
CHECKED_SECTIONS = ("model", "expert_training", "moe_training", "export", "evaluation", *SECTIONS_OF_METHODS)
"""Sections with keys that not every method has."""


class Recipe(RecipePart):
    """A whole run, from a dense checkpoint and a corpus to an exported model and its report."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=LONGEST_NAME)
    """The run's name; everything it writes lies under runs/NAME/."""
    method: ModelMethod = "l0moe"
    """What is made of the dense model; docs/methods.md has the methods beside L0-MoE."""
    seed: int = Field(default=1234, ge=1, le=MOST)
    dtype: DtypeChoice = "auto"
    """Of training and evaluation alike. auto: bfloat16 on GPUs; on a CPU what it multiplies matrices faster in."""
    model: ModelSection
    data: DataSection
    expert_training: ExpertTrainingSection = ExpertTrainingSection()
    moe_training: MoETrainingSection = MoETrainingSection()
    dsmoe: DSMoESection = DSMoESection()
    mom: MoMSection = MoMSection()
    export: ExportSection = ExportSection()
    evaluation: EvaluationSection = EvaluationSection()
    gpus: Processes | None = None
    """GPUs that the run may use at the same time; in a file it also chooses one of the `layouts`."""

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        self._check_method()
        self._check_dtype()
        k = self.model.num_experts
        if self.method == "l0moe" and self.model.top_k > k:
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

    def _check_method(self) -> None:
        if found := misplaced_key(self.method, {name: getattr(self, name) for name in CHECKED_SECTIONS}):
            raise ValueError(found)
        if self.method == "l0moe" and self.model.expert_ffn < 1:
            raise ValueError(
                f"model.expert_ffn ({self.model.expert_ffn}) must be at least 1 for method l0moe: the units of the "
                "dense FFN that each expert keeps"
            )
        if self.method != "l0moe" and self.moe_training.parallel.context > 1:
            raise ValueError(
                f"moe_training.parallel.context ({self.moe_training.parallel.context}) must be 1 for method "
                f"{self.method}, which was never run with more"
            )

    def _check_dtype(self) -> None:
        for section in SECTIONS:
            flag = self._dtype_flag(section)
            if flag and self.dtype != "auto" and flag != DTYPE_FLAGS.get(self.dtype):
                raise ValueError(
                    f"{section}.flags sets {flag!r}, but dtype is {self.dtype}; remove one of the two"
                )

    def _dtype_flag(self, section: Section) -> str | None:
        flags = self.expert_training.flags if section == "expert_training" else self.moe_training.flags
        return next((name for name in ("bf16", "fp16") if name in flags), None)

    def dtype_flags(self, section: Section) -> Flags:
        """Return Megatron's flag of the dtype that a section trains in; none for float32, or if its `flags` say it."""
        name = None if self._dtype_flag(section) else DTYPE_FLAGS.get(self.dtype)
        return {name: True} if name else {}

    def trains_in_bf16(self, section: Section) -> bool:
        """Say whether the weights of a training section are bfloat16."""
        return "bf16" in (self._dtype_flag(section), *self.dtype_flags(section))

    def settled(self, dtype: Dtype = "float32") -> "Recipe":
        """Return the recipe with `dtype` in the place of every `auto`."""
        of_run = dtype if self.dtype == "auto" else self.dtype
        if self.evaluation.dtype != "auto":
            return self.model_copy(update={"dtype": of_run})
        evaluation = self.evaluation.model_copy(update={"dtype": of_run})
        return self.model_copy(update={"dtype": of_run, "evaluation": evaluation})

    def parallel(self, section: Section) -> ParallelSection:
        """Return the layout's keys of a training section."""
        return self.expert_training.parallel if section == "expert_training" else self.moe_training.parallel

    def job_sizes(self, section: Section) -> JobSizes:
        """Return what a layout has to divide, as far as the recipe knows it without the model."""
        is_moe = section == "moe_training"
        has_experts = is_moe and self.method == "l0moe"
        return JobSizes(
            experts=self.model.num_experts if has_experts else 0,
            expert_ffn=self.model.expert_ffn if has_experts else None,
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
    def set_passes(self) -> int | None:
        """How often the ordered sets are gone through; None: once."""
        return self.data.set_passes if self.data.set_passes > 1 else None

    @property
    def expert_dtype(self) -> str | None:
        """What `dtype` alone makes of the expert runs; None: float32, or what their `flags` say."""
        return next(iter(self.dtype_flags("expert_training")), None) if self.construction is None else None

    @property
    def moe_dtype(self) -> str | None:
        """What `dtype` alone makes of MoE training; None: float32, or what its `flags` say."""
        return next(iter(self.dtype_flags("moe_training")), None)

    @property
    def router_init(self) -> RouterInit | None:
        """How the routers start; None: with domain means."""
        init = self.moe_training.router_init
        return None if init == "domain_mean" else init

    @property
    def method_settings(self) -> dict[str, Any] | None:
        """What a method beside L0-MoE depends on; None for L0-MoE, whose hashes are older than `method`."""
        if self.method == "l0moe":
            return None
        section: RecipePart = getattr(self, self.method)
        return {"method": self.method, **section.model_dump()}

    @property
    def moe_steps(self) -> int:
        """Optimizer steps of MoE training: whole global batches of every set."""
        batch = self.moe_global_batch_size * self.data.seq_length
        sets = (self.data.iterations - 1) * self.data.set_passes
        return sets * (self.data.tokens_per_set // batch) + self.data.include_initial_tokens // batch


class RecipeFile(Recipe):
    """A recipe as it is written: with one layout, or with one for each number of GPUs."""

    layouts: dict[Processes, LayoutBlock] = Field(default_factory=dict)
    """Number of GPUs -> what changes with it."""

    @model_validator(mode="after")
    def _check_layouts(self) -> "RecipeFile":
        if self.layouts and self.method != "l0moe":
            raise ValueError(
                f"layouts hold the expert runs' layouts too, and method is {self.method}; remove them and write "
                "moe_training.parallel"
            )
        counts = ", ".join(map(str, sorted(self.layouts)))
        if self.layouts and self.gpus is None:
            raise ValueError(
                f"layouts need gpus, the number that holds; add gpus: {min(self.layouts)}, or another of {counts}"
            )
        if self.layouts and self.gpus not in self.layouts:
            raise ValueError(
                f"gpus ({self.gpus}) must be one of the numbers in layouts, {counts}; add what `l0moe plan RECIPE "
                f"--gpus {self.gpus}` prints for it"
            )
        for count in self.layouts:
            self.resolved(count)
        return self

    def resolved(self, gpus: int | None = None) -> Recipe:
        """Return the recipe with the layouts for so many GPUs (None: those of its `gpus`) in their places.

        Raises:
            ValueError: they do not fit the recipe.
        """
        raw = self.model_dump(exclude={"layouts"}, exclude_unset=True)
        if not self.layouts:
            return Recipe.model_validate(raw)
        count = gpus or self.gpus
        assert count is not None, "checked above"
        try:
            return Recipe.model_validate(with_block(raw, count, self.layouts[count]))
        except ValidationError as error:
            raise ValueError(f"layouts.{count}: {first_problem(error, Recipe)}") from error


def load_recipe(path: str | Path) -> Recipe:
    """Read and validate a recipe.

    Raises:
        L0MoEError: the file is missing, is not YAML, or breaks a rule; the message names the key.
    """
    return load_settings(path, RecipeFile, what="Recipe", examples="examples/").resolved()


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

"""The recipe: one YAML file that describes a whole run, validated strictly, frozen after loading.

Unknown keys, wrong types and sizes that do not fit each other stop here, before anything is computed.
Relative paths in a recipe are relative to the folder that the command is run in.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_l0moe.errors import L0MoEError, nearest
from megatron_l0moe.planning.layout_rules import JobSizes, refusal
from megatron_l0moe.planning.layouts import Layout

Flag = bool | int | float | str
Section = Literal["expert_training", "moe_training"]
SECTIONS: tuple[Section, ...] = ("expert_training", "moe_training")


def _check_flags(flags: dict[str, Flag]) -> dict[str, Flag]:
    for name, value in flags.items():
        if name.startswith("-") or "_" in name:
            raise ValueError(
                f"flag {name!r} must be written without leading dashes and with '-' between words; "
                f"write {name.lstrip('-').replace('_', '-')!r}"
            )
        if value is False:
            raise ValueError(f"flag {name!r} is false, which means nothing on a command line; remove it")
    return flags


Flags = Annotated[dict[str, Flag], AfterValidator(_check_flags)]


class _Section(BaseModel):
    """Base of all recipe sections: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSection(_Section):
    """The dense base model and the shape of the L0-MoE that is made from it."""

    path: str
    """Folder of a Hugging Face checkpoint (config.json, *.safetensors, tokenizer)."""
    dense_layers: int = Field(ge=0)
    """Bottom layers that stay dense (paper: 8 for Llama-3 and Mistral, 4 for Qwen2)."""
    num_experts: int = Field(ge=2)
    """K: clusters, domains and experts of each MoE layer."""
    expert_ffn: int = Field(ge=1)
    """Units of the dense FFN that each expert keeps, exactly, in every MoE layer."""
    top_k: int = Field(default=2, ge=1)
    """Experts that serve one token."""


class SignalRange(_Section):
    """Values of a quality signal that a document may have; None: no limit."""

    min: float | None = None
    max: float | None = None


class FilterSection(_Section):
    """Which documents of the corpus are used; each dropped one is counted by its reason."""

    min_chars: int = Field(default=0, ge=0)
    languages: list[str] | None = Field(default=None, min_length=1)
    """Codes such as en; a document without one is dropped then. None: all."""
    quality_signals: dict[str, SignalRange] = Field(default_factory=dict)
    """Of RedPajama v2, by name, such as rps_doc_word_count: {min: 50}."""
    drop_duplicates: bool = True
    """Drop exact repetitions of a text, and what RedPajama v2's duplicates files list."""


class DataSection(_Section):
    """Where the text comes from and how it is cut into ordered, balanced sets (paper section 3.1)."""

    corpus: str
    """Folder, or fsspec URL, of shards: RedPajama v1 (*.jsonl, .zst, .gz) or v2, Parquet or text files."""
    corpus_format: Literal["auto", "jsonl", "redpajama_v2", "parquet", "text"] = "auto"
    filters: FilterSection = FilterSection()
    max_quarantined: float = Field(default=0.01, ge=0, le=1)
    """Fraction of documents, and of shards, that may be unreadable before the stage stops."""
    embedding_model: str
    """Path or name of the sentence encoder, loaded through FlagEmbedding (BGE-M3 in the paper)."""
    embedding_max_tokens: int = Field(default=512, ge=8)
    embedding_batch_size: int = Field(default=32, ge=1)
    iterations: int = Field(default=21, ge=2)
    """Q: iteration 0 makes the experts' sets D^(0), the Q - 1 others are ordered for MoE training."""
    seq_length: int = Field(default=4096, ge=8)
    """Tokens of one packed training sequence."""
    tokens_per_expert: int = Field(ge=1)
    """Training tokens of each cluster of D^(0), that is of each expert run."""
    tokens_per_set: int = Field(ge=1)
    """Training tokens of each of the Q - 1 later sets, all K clusters together."""
    include_initial_tokens: int = Field(default=0, ge=0)
    """Tokens of D^(0), all clusters together, replayed before the ordered sets in MoE training."""
    heldout_tokens_per_domain: int = Field(default=8192, ge=1)
    """Tokens of each source domain kept out of training for perplexity."""
    matching: Literal["hungarian", "none"] = "hungarian"
    """How centres of later iterations are paired with those of iteration 0 before eq. 4."""
    beta: float = 0.5
    """Weight of the mean in eq. 5."""
    delta: float = 0.1
    """Factor of f3 in eq. 4."""
    rotate: bool = True
    """Rotate the cyclic domain order every round, so that a data-parallel rank sees all domains."""


class ParallelSection(_Section):
    """Parallel layout of one training job; the products must fit the processes that are started."""

    processes: int = Field(default=1, ge=1)
    """Processes (GPUs) in all."""
    nodes: int = Field(default=1, ge=1)
    tensor: int = Field(default=1, ge=1)
    sequence: bool = True
    """Sequence parallelism where tensor is above 1; an MoE needs it."""
    pipeline: int = Field(default=1, ge=1)
    virtual_pipeline: int = Field(default=1, ge=1)
    """Model chunks of each pipeline rank, which shorten the pipeline's idle time."""
    pipeline_layers: list[int] | None = Field(default=None, min_length=2)
    """Layers of each of the pipeline * virtual_pipeline stages; None: the same number in all."""
    overlap_p2p: bool = True
    """Send the messages of a virtual pipeline while computing, not in batches."""
    expert: int = Field(default=1, ge=1)
    expert_tensor: int | None = Field(default=None, ge=1)
    """Processes that share one expert; None: as many as tensor."""
    context: int = Field(default=1, ge=1)
    """Processes that share one sequence; needs GPUs with Transformer Engine."""
    distributed_optimizer: bool = False
    """Spread the optimizer's state over the data-parallel processes."""
    dispatcher: Literal["alltoall", "allgather"] | None = None
    """How tokens travel to their experts; None: what the machine takes."""
    threads: int = Field(default=1, ge=1)
    """OMP threads of each process."""

    @property
    def layout(self) -> Layout:
        """The layout without what belongs to the machine, its nodes and threads."""
        return Layout(
            processes=self.processes,
            tensor=self.tensor,
            sequence=self.sequence and self.tensor > 1,
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual_pipeline,
            pipeline_layers=tuple(self.pipeline_layers or ()),
            overlap_p2p=self.overlap_p2p,
            expert=self.expert,
            expert_tensor=self.expert_tensor,
            context=self.context,
            distributed_optimizer=self.distributed_optimizer,
            dispatcher=self.dispatcher,
        )


class ExpertTrainingSection(_Section):
    """The K expert runs (paper section 3.2)."""

    micro_batch_size: int = Field(default=1, ge=1)
    global_batch_size: int = Field(default=32, ge=1)
    """Sequences of one step."""
    learning_rate: float = Field(default=1e-4, gt=0)
    mask_learning_rate: float = Field(default=0.3, gt=0)
    train_weights: bool = True
    """False: train the masks only; an expert is then a list of units of the dense model."""
    save_interval: int = Field(default=100, ge=1)
    at_once: int = Field(default=1, ge=1)
    """Experts that one machine trains at the same time, each on `parallel.processes` GPUs of its own."""
    parallel: ParallelSection = ParallelSection()
    flags: Flags = Field(default_factory=dict)
    """Further flags of Megatron or `l0-...` flags, by their names without the leading dashes."""


class MoETrainingSection(_Section):
    """MoE training (paper section 3.3)."""

    micro_batch_size: int = Field(default=1, ge=1)
    sequences_per_domain: int = Field(default=1, ge=1)
    """p: each global batch holds p sequences of each of the K domains."""
    learning_rate: float = Field(default=1e-4, gt=0)
    router_learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of the routers; None: that of the other weights."""
    save_interval: int = Field(default=100, ge=1)
    parallel: ParallelSection = ParallelSection()
    flags: Flags = Field(default_factory=dict)


class EvaluationSection(_Section):
    """Perplexity per domain and speed, dense against L0-MoE, with transformers."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    prefill_tokens: int = Field(default=512, ge=1)
    decode_tokens: int = Field(default=32, ge=1)
    repeats: int = Field(default=5, ge=1)
    parity_positions: int = Field(default=64, ge=1)
    """Positions of real text on which Megatron's and the exported model's logits are compared."""


class ExportSection(_Section):
    """Which inference engines the exported L0-MoE is for."""

    target: Literal["transformers", "vllm", "sglang", "all"] = "all"
    """all: one checkpoint if one layout serves them all, else a second one in a folder below it."""


class Recipe(_Section):
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

"""The sections of a recipe: their keys, defaults and the values that a key alone may have; see `recipe.py`."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from megatron_l0moe.recipe.layout import (
    MOST,
    MOST_EXPERTS,
    Count,
    Flag,
    Flags,
    ParallelSection,
    RecipePart,
)
from megatron_l0moe.recipe.yaml_file import check_option_name

Method = Literal["l0", "random", "magnitude", "obs", "svd", "coactivation"]
RouterInit = Literal["domain_mean", "normal"]
Dtype = Literal["float32", "bfloat16"]


def _check_options(options: dict[str, str | int]) -> dict[str, str | int]:
    for name in options:
        check_option_name(name)
    return options


class ModelSection(RecipePart):
    """The dense base model and the shape of the L0-MoE that is made from it."""

    path: str
    """Folder of a Hugging Face checkpoint (config.json, *.safetensors, tokenizer)."""
    dense_layers: int = Field(ge=0, le=MOST)
    """Bottom layers that stay dense (paper: 8 for Llama-3 and Mistral, 4 for Qwen2)."""
    num_experts: int = Field(ge=2, le=MOST_EXPERTS)
    """K: clusters and domains of the data and, of method l0moe, experts of each MoE layer."""
    expert_ffn: int = Field(default=0, ge=0, le=MOST)
    """Units of the dense FFN that each expert keeps, exactly, in every MoE layer; required for method l0moe."""
    top_k: int = Field(default=2, ge=1, le=MOST_EXPERTS)
    """Experts that serve one token."""


class SignalRange(RecipePart):
    """Values of a quality signal that a document may have; None: no limit."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _check(self) -> "SignalRange":
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max}), so no document would pass")
        return self


class FilterSection(RecipePart):
    """Which documents of the corpus are used; each dropped one is counted by its reason."""

    min_chars: int = Field(default=0, ge=0)
    languages: list[str] | None = Field(default=None, min_length=1)
    """Codes such as en; a document without one is dropped then. None: all."""
    quality_signals: dict[str, SignalRange] = Field(default_factory=dict)
    """Bounds for the signals of RedPajama v2, by name, such as rps_doc_word_count: {min: 50}."""
    drop_duplicates: bool = True
    """Drop exact repetitions of a text, and what RedPajama v2's duplicates files list."""


class SlurmSection(RecipePart):
    """What sbatch is told for curate's tasks."""

    partition: str
    time: str = "24:00:00"
    """The time limit of each task, in quotes."""
    qos: str | None = None
    environment: str | None = None
    """Shell line that prepares a job; None: this Python's folder comes first on the PATH."""
    sbatch: Annotated[dict[str, str | int], AfterValidator(_check_options)] = Field(default_factory=dict)
    """Further options by their long names, such as account."""
    shell_lines = frozenset({"environment"})


class ExecutorSection(RecipePart):
    """Where the heavy steps of curate run, as tasks of datatrove. The result does not depend on it."""

    kind: Literal["local", "slurm", "ray"] = "local"
    workers: int = Field(default=1, ge=1, le=100_000)
    """Tasks that run at the same time; one local worker is this process itself."""
    tasks: int | None = Field(default=None, ge=1, le=100_000)
    """Shares that a step is cut into; None: one for each worker."""
    cpus_per_task: Count = 1
    """Threads of a task; one local worker takes what the machine has."""
    mem_per_cpu_gb: Count = 4
    """Memory that Slurm or Ray reserves."""
    gpus_per_task: int = Field(default=0, ge=0, le=1)
    """What Slurm or Ray reserves for embedding; local workers share out the GPUs of the machine."""
    ray_address: str | None = None
    """The address of a running Ray cluster; None: Ray on this machine, for the time of the stage."""
    slurm: SlurmSection | None = None
    """Needed for kind slurm."""

    @model_validator(mode="after")
    def _check(self) -> "ExecutorSection":
        if self.kind == "slurm" and self.slurm is None:
            raise ValueError("kind is slurm, but the section slurm is missing; give at least slurm.partition")
        return self


class DataSection(RecipePart):
    """Where the text comes from and how it is cut into ordered, balanced sets (paper section 3.1)."""

    corpus: str
    """Folder, or fsspec URL, of shards, or one file: RedPajama v1 (*.jsonl, .zst, .gz) or v2, Parquet or text."""
    corpus_format: Literal["auto", "jsonl", "redpajama_v2", "parquet", "text"] = "auto"
    domain_key: str | None = Field(default=None, min_length=1)
    """Where a document's source domain is: a dotted path such as meta.subset, or folder; None: the known forms."""
    filters: FilterSection = FilterSection()
    max_quarantined: float = Field(default=0.01, ge=0, le=1)
    """Fraction of documents, and of shards, that may be unreadable before the stage stops."""
    embedding_model: str
    """Path or name of the sentence encoder, loaded through FlagEmbedding (BGE-M3 in the paper)."""
    embedding_max_tokens: int = Field(default=512, ge=8, le=MOST)
    embedding_batch_size: Count = 32
    iterations: int = Field(default=21, ge=2, le=10_000)
    """Q: iteration 0 makes the experts' sets D^(0), the Q - 1 others are ordered for MoE training."""
    seq_length: int = Field(default=4096, ge=8, le=MOST)
    """Tokens of one packed training sequence."""
    eod: int | None = Field(default=None, ge=0, le=MOST)
    """Id of the token that ends a document; None: the model's, see docs/curate.md."""
    tokens_per_expert: int = Field(ge=1)
    """Training tokens of each cluster of D^(0), that is of each expert run."""
    tokens_per_set: int = Field(ge=1)
    """Training tokens of each of the Q - 1 later sets, all K clusters together."""
    include_initial_tokens: int = Field(default=0, ge=0)
    """Tokens of D^(0), all clusters together, replayed before the ordered sets in MoE training."""
    set_passes: int = Field(default=1, ge=1, le=10_000)
    """How often MoE training goes through the ordered sets, in the same order; with iterations 2 one set repeated."""
    heldout_tokens_per_domain: int = Field(default=8192, ge=1)
    """Tokens of each source domain kept out of training for perplexity."""
    clustering: Literal["kmeans", "random"] = "kmeans"
    """random: folds of equal size without k-means, the paper's ablation."""
    matching: Literal["hungarian", "none"] = "hungarian"
    """How centres of later iterations are paired with those of iteration 0 before eq. 4."""
    beta: float = 0.5
    """Weight of the mean in eq. 5."""
    delta: float = 0.1
    """Factor of f3 in eq. 4."""
    order: Literal["ascending", "descending", "random"] = "ascending"
    """Order of the Q - 1 later sets in MoE training, by d_ds of eq. 5; random is the paper's ablation."""
    batches: Literal["balanced", "random"] = "balanced"
    """balanced: p sequences of each domain in every global batch; random: a set's sequences shuffled (ablation)."""
    rotate: bool | None = None
    """Rotate the cyclic domain order every round, so that a data-parallel rank sees all domains. None: yes, where
    batches are balanced; random ones have no rounds."""

    executor: ExecutorSection = ExecutorSection()

    @property
    def rotates(self) -> bool:
        """Whether balanced batches start at another domain in every round."""
        return self.batches == "balanced" and self.rotate is not False


class CalibrationSection(RecipePart):
    """The pass through the dense model from which experts are made without training."""

    tokens: int = Field(default=131072, ge=1)
    """Tokens of each expert's pass, in whole sequences; never more than data.tokens_per_expert."""
    damping: float = Field(default=0.01, gt=0)
    """obs and svd: added to the diagonal of sums of a a^T, as a fraction of its mean."""
    shared: float = Field(default=0.5, ge=0, le=1)
    """coactivation: share of an expert's units that all experts have."""


class ExpertTrainingSection(RecipePart):
    """The K expert runs (paper section 3.2), or another way to construct the experts."""

    method: Method = "l0"
    """l0: learned masks; the others choose units from one calibration pass each and train nothing."""
    calibration: CalibrationSection = CalibrationSection()
    """The calibration pass of the methods other than l0."""
    micro_batch_size: Count = 1
    global_batch_size: Count = 32
    """Sequences of one step."""
    learning_rate: float = Field(default=1e-4, gt=0)
    mask_learning_rate: float = Field(default=0.3, gt=0)
    train_weights: bool = True
    """False: train the masks only; an expert is then a list of units of the dense model."""
    save_interval: Count = 100
    at_once: int = Field(default=1, ge=1, le=MOST_EXPERTS)
    """Experts that one machine trains at the same time, each on `parallel.processes` GPUs of its own."""
    parallel: ParallelSection = ParallelSection()
    flags: Flags = Field(default_factory=dict)
    """Further flags of Megatron or `l0-...` flags, by their names without the leading dashes."""

    @model_validator(mode="after")
    def _check(self) -> "ExpertTrainingSection":
        if self.method == "l0":
            return self
        if not self.train_weights:
            raise ValueError(
                f"train_weights false is a way of method l0, but method is {self.method}; remove it"
            )
        if self.parallel.virtual_pipeline > 1:
            raise ValueError(
                f"method {self.method} trains nothing, which is what a virtual pipeline is for; remove "
                "parallel.virtual_pipeline"
            )
        return self


class MoETrainingSection(RecipePart):
    """MoE training (paper section 3.3)."""

    micro_batch_size: Count = 1
    sequences_per_domain: int = Field(default=1, ge=1, le=2**20)
    """p: each global batch holds p sequences of each of the K domains."""
    learning_rate: float = Field(default=1e-4, gt=0)
    router_learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of the routers; None: that of the other weights."""
    router_init: RouterInit = "domain_mean"
    """domain_mean: the centred, normalised mean of the layer's router input over each domain; normal: (0, 0.02)."""
    save_interval: Count = 100
    parallel: ParallelSection = ParallelSection()
    flags: Flags = Field(default_factory=dict)


class BenchmarkSection(RecipePart):
    """Tasks of the LM evaluation harness; dense and L0-MoE get the same harness, tasks and arguments."""

    tasks: list[str] = Field(min_length=1)
    """The harness' own names of tasks and groups, such as gsm8k, bbh, mmlu, humaneval or mmlu_anatomy."""
    backend: Literal["hf", "vllm", "sglang"] = "hf"
    local_data: str | None = None
    """Folder of local copies, see docs/evaluate.md; None: the harness fetches its data sets."""
    limit: int | None = Field(default=None, ge=1)
    """First documents of each task only, to try it; None: all."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples in each prompt; None: as many as the task's own definition says."""
    batch_size: int | Literal["auto"] = 1
    max_length: int | None = Field(default=None, ge=1)
    """Tokens of prompt and answer; None: what both models can take."""
    allow_code_execution: bool = False
    """HumanEval runs what the models write: true permits it, in an isolated process."""
    backend_arguments: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], Flag] = Field(
        default_factory=dict
    )
    """Further arguments of the harness' backend, the same for both models, such as tensor_parallel_size."""

    @model_validator(mode="after")
    def _check(self) -> "BenchmarkSection":
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError("tasks names a task twice; remove one")
        if isinstance(self.batch_size, int) and self.batch_size < 1:
            raise ValueError(f"batch_size ({self.batch_size}) must be at least 1, or 'auto'")
        return self


class EvaluationSection(RecipePart):
    """Perplexity per domain and speed, dense against L0-MoE, with transformers; and benchmarks where asked for."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The dtype of both models when they are measured; auto: that of the recipe."""
    prefill_tokens: Count = 512
    decode_tokens: Count = 32
    repeats: int = Field(default=5, ge=1, le=10_000)
    parity_positions: Count = 64
    """Positions of real text on which Megatron's and the exported model's logits are compared."""
    benchmarks: BenchmarkSection | None = None
    """None: no benchmarks are run."""

    @property
    def settled_dtype(self) -> Dtype:
        """The dtype; one that is still `auto`, outside of a run, is float32."""
        return "float32" if self.dtype == "auto" else self.dtype


class ExportSection(RecipePart):
    """Which inference engines the exported L0-MoE is for."""

    target: Literal["transformers", "vllm", "sglang", "all"] = "all"
    """all: one checkpoint if one layout serves them all, else a second one in a folder below it."""

"""What each file that the report reads must hold; what the report does not use may be anything."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from megatron_l0moe.errors import L0MoEError

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
Shares = Annotated[dict[str, Annotated[list[NotNegative], Field(min_length=1)]], Field(min_length=1)]
"""The shares of each expert or block, by source domain."""
Layers = Annotated[dict[str, Shares], Field(min_length=1)]
"""router_load.json."""


class Form(BaseModel):
    """Whole and finite numbers as such, and further keys as they come."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Table(Form):
    """The table of one model in perplexity.json."""

    overall: Positive
    tokens: Count
    per_domain: Annotated[dict[str, Positive], Field(min_length=1)]
    domain_tokens: dict[str, Count]
    per_cluster: dict[str, Positive]
    cluster_tokens: dict[str, Count]


class Spread(Form):
    """The spread over the pairs of one mode in speed.json."""

    median: Positive
    min: Positive
    max: Positive
    iqr: NotNegative


class Pace(Form):
    """The speed of one model in one mode."""

    tokens_per_second: Positive


class Mode(Form):
    """One mode of speed.json; the second model stands under the recipe's method."""

    tokens: Size
    dense: Pace
    ratio: Spread


class Modes[Value](Form):
    """A value for each mode."""

    prefill: Value
    decode_b1: Value
    decode_b8: Value


class Versions(Form):
    """The versions of the packages that speed was measured with."""

    torch: str | None
    transformers: str | None


class Hardware(Form):
    """What speed was measured on."""

    cpu: str
    device: str
    threads: Size
    cores: Size | None
    versions: Versions
    date: str


class SpeedSettings(Form):
    """How speed was measured."""

    dtype: str
    experts_implementation: str | None
    repeats: Size
    prompt_tokens: Count


class Speed(Form):
    """speed.json."""

    prefill_ratio: Positive
    decode_b1_ratio: Positive
    decode_b8_ratio: Positive
    bounds: Modes[Positive]
    details: Modes[Mode]
    settings: SpeedSettings
    hardware: Hardware


class OpenBlocks(Form):
    """open_blocks.json."""

    mean_open: Positive
    layers: Layers


class Parity(Form):
    """parity.json."""

    max_abs: NotNegative
    positions: Size
    near_ties: list[dict[str, Any]] = []


class Ccm(Form):
    """ccm.json: rows are the sets 1 to Q-1."""

    f1: list[Annotated[list[float], Field(min_length=1)]]
    f2: list[Annotated[list[float], Field(min_length=1)]]
    f3: list[Annotated[list[float], Field(min_length=1)]]
    ccm: list[Annotated[list[float], Field(min_length=1)]]
    d_ds: list[float]
    order: Annotated[list[Size], Field(min_length=1)]
    ordering: str


class Corpus(Form):
    """summary.json of curate."""

    domains: list[str]
    table: list[list[Count]]


class Step(Form):
    """A line of metrics.jsonl."""

    iteration: Count
    tokens: Count
    lm_loss: float
    seconds: NotNegative
    balance_loss: float | None = None
    z_loss: float | None = None
    active_fraction: dict[str, float] | None = None
    sparsity_loss: dict[str, float] | None = None


class MaskedStep(Step):
    """A line of a training with masks."""

    retention: Annotated[dict[str, float], Field(min_length=1)]
    retention_target: float | None = None


class Config(Form):
    """config.json of a model: what parameters are counted from."""

    model_type: str
    hidden_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    vocab_size: Size
    intermediate_size: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    moe_intermediate_size: Size | None = None
    moe_num_experts: Size | None = None
    moe_k: Size | None = None
    num_experts: Size | None = None
    num_experts_per_tok: Size | None = None
    num_blocks: Size | None = None
    num_dense_layers: Count | None = None


class Score(Form):
    """A number with its standard error."""

    value: float | None
    stderr: float | None


class ScoreRow(Form):
    """One metric of one task."""

    task: str
    metric: str
    filter: str
    headline: bool
    documents: Count
    dense: Score
    l0moe: Score
    ratio: Score


class Benchmarks(Form):
    """benchmarks.json."""

    harness: dict[str, str]
    backend: str
    limit: Size | None = None
    rows: list[ScoreRow]


class GpuSample(Form):
    """A line of a file of GPU samples."""

    gpu: str
    time: float
    power: NotNegative | None = None
    memory: NotNegative | None = None
    utilization: NotNegative | None = None


class Manifest(Form):
    """manifest.json of a stage."""

    config_hash: str
    command: list[str] = []
    versions: dict[str, str] = {}
    machine: dict[str, Any] = {}
    numbers: Any = None


class ConstructionNumbers(Form):
    """The numbers of an expert that was made without training."""

    calibration_tokens: Count
    layers: dict[str, Any]
    calibration_loss: float


class ConstructionManifest(Manifest):
    """manifest.json of such an expert."""

    numbers: ConstructionNumbers


class MasksNumbers(Form):
    """The numbers of the export of a Mixture-of-Masks."""

    expert_ffn: Size
    num_shared_experts: Count
    units: dict[str, dict[str, Any]]


class MasksManifest(Manifest):
    """manifest.json of such an export."""

    numbers: MasksNumbers


def check(value: Any, form: Any, file: Path, mend: str) -> None:
    """Compare a value with a form.

    Raises:
        L0MoEError: names the file and the first key that is missing or of another kind.
    """
    try:
        TypeAdapter(form).validate_python(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise L0MoEError(f"{file} has no fitting {key or 'content'} ({problem['msg']}); {mend}.") from error

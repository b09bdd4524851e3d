"""What settings.yaml holds, and where each step writes. Strict: an unknown key stops the program."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.layout import Flags, RecipePart
from megatron_l0moe.recipe.recipe import section_hash
from megatron_l0moe.runs.stage_folder import StageFolder


class CorpusSettings(RecipePart):
    """The split of the corpus, before any token is made."""

    seed: int = 1
    heldout_chars: int = Field(ge=1)
    """Text of each domain that nothing is ever trained on, the tokenizer included."""
    document_chars: int = Field(ge=100)
    """Longer training documents are cut at line ends: clusters are made of documents."""


class TokenizerSettings(RecipePart):
    """Byte-level BPE."""

    vocab_size: int = Field(ge=257)
    chars_per_domain: int = Field(ge=1)
    """Text of each domain that the merges are counted in."""


class ModelSettings(RecipePart):
    """The dense base, a Llama with tied embeddings."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int


class TrainingSettings(RecipePart):
    """One dense training run."""

    steps: int = Field(ge=1)
    global_batch_size: int = Field(ge=1)
    micro_batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    warmup_share: float = Field(ge=0, lt=1)
    save_interval: int = Field(ge=1)
    processes: int = Field(default=1, ge=1)
    """Data-parallel; the result does not depend on it."""
    seed: int = 1
    flags: Flags = Field(default_factory=dict)

    @property
    def decisive(self) -> dict[str, Any]:
        """What the trained weights depend on."""
        return self.model_dump(exclude={"save_interval", "processes"})


class DataSettings(RecipePart):
    """Sequences, the same for every model."""

    seq_length: int = Field(ge=8)
    heldout_tokens_per_domain: int = Field(ge=1)


class SpeedSettings(RecipePart):
    """How every model is timed against the base."""

    prefill_tokens: int = Field(ge=1)
    decode_tokens: int = Field(ge=1)
    repeats: int = Field(ge=1)
    """Pairs that count."""


class PretrainedSettings(RecipePart):
    """A dense base that is there already."""

    path: str
    """Hugging Face folder."""
    heldout_seed: int = 1


class OwnBaseSettings(RecipePart):
    """A dense base that is pretrained here."""

    tokenizer: TokenizerSettings
    model: ModelSettings
    training: TrainingSettings


class Settings(RecipePart):
    """Everything but the table of runs."""

    page: str = Field(pattern="^[a-z0-9-]+$")
    """Name of the page of results and, before an underscore, of its plots."""
    title: str
    """Of the page."""
    corpus: CorpusSettings
    data: DataSettings
    base: OwnBaseSettings | PretrainedSettings
    speed: SpeedSettings


@dataclass(frozen=True)
class Place:
    """The folder that everything is written to, with the settings that its steps must have been done with."""

    root: Path
    settings: Settings
    source: Path
    """Folder of the corpus as it was given."""

    @property
    def base_model(self) -> Path:
        """Hugging Face folder of the trained base."""
        return self.root / "base" / "hf"

    @property
    def own_base(self) -> OwnBaseSettings:
        """How the base is made.

        Raises:
            L0MoEError: it is a model that was there.
        """
        base = self.settings.base
        if isinstance(base, PretrainedSettings):
            raise L0MoEError(
                f"The base is {base.path}, which was not pretrained here, so no dense-small can be pretrained as it "
                "was; remove the row."
            )
        return base

    @property
    def is_pretrained(self) -> bool:
        """Whether the base is a model that was there."""
        return isinstance(self.settings.base, PretrainedSettings)

    @property
    def tokenizer_folder(self) -> Path:
        """The step that has the tokenizer."""
        return self.root / ("base" if self.is_pretrained else "tokenizer")

    def corpus(self) -> StageFolder:
        """train/ and heldout/, a shard a domain."""
        files = sorted((file.name, file.stat().st_size) for file in self.source.glob("*.jsonl*"))
        if not files:
            raise L0MoEError(
                f"{self.source} holds no *.jsonl shards; give --corpus the folder of a corpus, see README.md."
            )
        return StageFolder("corpus", self.root / "corpus", section_hash(self.settings.corpus, files))

    def tokenizer(self) -> StageFolder:
        """The untrained model's folder: config.json and the tokenizer."""
        own = self.own_base
        asked = section_hash(own.tokenizer, own.model, self.settings.data.seq_length)
        return StageFolder("tokenizer", self.root / "tokenizer", asked, (self.root / "corpus",))

    def tokens(self) -> StageFolder:
        """The held-out sequences on which every model is measured, and the sample index of a base's pretraining."""
        base, data = self.settings.base, self.settings.data
        if isinstance(base, PretrainedSettings):
            asked = section_hash(data, base.heldout_seed)
        else:
            training = base.training
            asked = section_hash(data, training.steps * training.global_batch_size, training.seed)
        inputs = (self.root / "corpus", self.tokenizer_folder)
        return StageFolder("tokens", self.root / "tokens", asked, inputs)

    def base(self) -> StageFolder:
        """The base's training and its export, or the links to a base that was there."""
        base = self.settings.base
        if isinstance(base, PretrainedSettings):
            return StageFolder("base", self.root / "base", section_hash(base.path))
        inputs = (self.root / "tokens", self.root / "tokenizer")
        return StageFolder("base", self.root / "base", section_hash(base.training.decisive), inputs)


def load_settings(file: Path) -> Settings:
    """Read settings.yaml.

    Raises:
        L0MoEError: names the key that is wrong.
    """
    return parse(Settings, file)


def parse[Part: RecipePart](kind: type[Part], file: Path) -> Part:
    """Read a YAML file into a strict model."""
    if not file.is_file():
        raise L0MoEError(f"{file} does not exist.")
    raw: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise L0MoEError(f"{file}: {where}: {first['msg']}.") from error

"""The chain as a table: what each stage does and reads, where it writes, and which settings its result depends on.

Functions of a stage's name do it (`chain/stage_work.py`), show it (`chain/dry_run.py`) and say how long it takes
(`chain/forecast.py`). No other file lists the stages.
"""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from megatron_l0moe.errors import L0MoEError, nearest
from megatron_l0moe.recipe.layout import FREE_FLAGS
from megatron_l0moe.recipe.recipe import TITLES, ModelMethod, Recipe, Section, section_hash
from megatron_l0moe.recipe.yaml_file import check_text
from megatron_l0moe.runs.stage_folder import Restart, StageFolder


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One row of the chain."""

    name: str
    does: str
    help: str
    """What the command `l0moe NAME` says of itself."""
    inputs: tuple[str, ...]
    """Stages whose files are read."""
    settings: tuple[str, ...]
    """Recipe keys that can change the result; `section` stands for all of its keys.

    Left out on purpose: the parallel layout, flags of recomputation, curate's executor, the number of threads, how
    often a checkpoint is saved and which are kept. They do not change the result, so a run may go on in another layout.
    """
    added: tuple[str, ...] = ()
    """Keys that came later: where one is None, the hash is what it was before there was such a key."""
    restart: Restart = "clear"
    """What an interrupted run of the stage goes on from."""
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names in the folders of stages before, of any method, which are compared with what those stages recorded."""
    reads_quickly: bool = False
    """Whether its inputs are read within minutes, so they are compared meanwhile; others compare before they begin."""
    trains: Section | None = None
    """The section of the recipe that its training job follows."""
    by_expert: bool = False
    """Whether it has one folder, and one training job, for each expert."""
    wants_gpu: bool = False
    """Whether a stage that does not train is faster on a GPU."""


EXPORTED = ("*.safetensors", "*.json", "*.py", "*.model*", "*.txt", "*.jinja")
"""What a model is loaded from; the rest of an export is for people."""
CHAIN: tuple[StageSpec, ...] = (
    StageSpec(
        name="convert",
        does="turn the dense Hugging Face checkpoint into a Megatron checkpoint",
        help="Turn the dense Hugging Face checkpoint into a Megatron checkpoint.",
        inputs=(),
        settings=("model.path",),
        reads_quickly=True,
    ),
    StageSpec(
        name="curate",
        does="cluster the corpus into K domains and cut it into Q ordered sets of token files",
        help="Cluster the corpus into K domains and cut it into Q ordered sets.",
        inputs=(),
        settings=(
            "seed",
            "model.path",
            "model.num_experts",
            "data",
            "expert_training.global_batch_size",
            "moe_training.sequences_per_domain",
        ),
        added=("set_passes", "data.domain_key"),
        restart="own",
        wants_gpu=True,
    ),
    StageSpec(
        name="experts",
        does="make one expert a domain: the dense FFN, by a learned L0 mask or another method, cut to the wanted width",
        help="Make the K experts, one domain each, and cut each to its exact width.",
        inputs=("convert", "curate"),
        settings=(
            "seed",
            "model.dense_layers",
            "model.expert_ffn",
            "expert_training.micro_batch_size",
            "expert_training.global_batch_size",
            "expert_training.learning_rate",
            "expert_training.mask_learning_rate",
            "expert_training.train_weights",
            "expert_training.flags",
        ),
        added=("construction", "expert_dtype"),
        restart="resume",
        reads={"convert": ("*",), "curate": ("expert_*.ccm.json",)},
        trains="expert_training",
        by_expert=True,
    ),
    StageSpec(
        name="assemble",
        does="put the K experts and a start for the routers into one Megatron MoE checkpoint",
        help="Put the K experts and the start of the routers into one MoE checkpoint.",
        inputs=("convert", "experts"),
        settings=("model.dense_layers", "model.num_experts", "model.expert_ffn", "model.top_k"),
        added=("router_init",),
        reads={"convert": ("*",), "experts": ("expert.safetensors",)},
        reads_quickly=True,
    ),
    StageSpec(
        name="moe",
        does="train experts and routers together on the ordered sets",
        help="Train experts and routers together on the ordered sets; of other methods: blocks and gates.",
        inputs=("curate", "assemble"),
        settings=(
            "seed",
            "model",
            "moe_training.micro_batch_size",
            "moe_training.sequences_per_domain",
            "moe_training.learning_rate",
            "moe_training.router_learning_rate",
            "moe_training.flags",
        ),
        added=("method_settings", "moe_dtype"),
        restart="resume",
        reads={"convert": ("*",), "curate": ("moe.ccm.json",), "assemble": ("*",)},
        trains="moe_training",
    ),
    StageSpec(
        name="export",
        does="write the L0-MoE as an ordinary Hugging Face checkpoint",
        help="Write the trained model as a Hugging Face checkpoint.",
        inputs=("moe",),
        settings=("model.path", "model.dense_layers", "model.top_k", "export"),
        reads={"moe": ("checkpoints/*",)},
        reads_quickly=True,
    ),
    StageSpec(
        name="evaluate",
        does="measure perplexity by domain, speed and benchmarks, dense against L0-MoE",
        help="Measure perplexity by domain, speed and benchmarks, dense against the model made of it.",
        inputs=("curate", "assemble", "moe", "export"),
        settings=("seed", "model", "evaluation"),
        reads={
            "curate": ("heldout.jsonl",),
            "assemble": ("*",),
            "moe": ("checkpoints/*",),
            "export": EXPORTED,
        },
        wants_gpu=True,
    ),
    StageSpec(
        name="report",
        does="write one HTML page and summary.json from everything that was measured",
        help="Write the HTML report and summary.json.",
        inputs=("convert", "curate", "experts", "assemble", "moe", "export", "evaluate"),
        settings=("name",),
        reads={
            "curate": ("ccm.json", "summary.json"),
            "experts": ("expert.safetensors", "metrics.jsonl", "gpu/*"),
            "moe": ("metrics.jsonl", "gpu/*"),
            "export": ("config.json",),
            "evaluate": ("*.json",),
        },
    ),
)
"""The chain of method l0moe, which has all stages there are."""
HASHED_APART = {"executor", "set_passes", "domain_key"}
"""Keys that a section's hash leaves out: the executor changes no result, the others stand in `added`."""
STAGE_NAMES: tuple[str, ...] = tuple(spec.name for spec in CHAIN)
TRAINING: Mapping[str, Section] = {spec.name: spec.trains for spec in CHAIN if spec.trains}
"""Stages with a training job, and the section of the recipe that it follows."""
ONLY_L0MOE = ("experts", "assemble")
"""Stages that other methods lack: their training starts from the dense checkpoint."""


def chain(method: ModelMethod) -> tuple[StageSpec, ...]:
    """Return the rows of a method, in their order."""
    if method == "l0moe":
        return CHAIN
    return tuple(_of_method(spec, TITLES[method]) for spec in CHAIN if spec.name not in ONLY_L0MOE)


def _of_method(spec: StageSpec, title: str) -> StageSpec:
    """Return a row of the L0-MoE chain as another method has it."""
    inputs = tuple(name for name in spec.inputs if name not in ONLY_L0MOE)
    does = spec.does.replace("L0-MoE", title)
    if spec.name == "moe":
        inputs, does = ("convert", *inputs), f"train the dense model as a {title} on the ordered sets"
    if spec.name == "export":
        does = f"write the {title} as a Hugging Face checkpoint"
    if spec.name == "evaluate":
        does = f"measure perplexity by domain, speed and parity, dense against {title}"
    return dataclasses.replace(spec, inputs=inputs, does=does)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A recipe and the folder that everything made from it lies in."""

    recipe: Recipe
    recipe_file: Path
    runs_dir: Path
    verify: bool = True
    """Whether a stage compares the files that it reads with what the stages before recorded."""

    def __post_init__(self) -> None:
        """Refuse paths that leave their line in a batch script or a record."""
        for what, path in (("--runs-dir", self.runs_dir), ("The recipe's path", self.recipe_file)):
            try:
                check_text(str(path))
            except ValueError as error:
                raise L0MoEError(f"{what} {str(path)!r}: {error}.") from error

    @property
    def folder(self) -> Path:
        """`runs/NAME`."""
        return self.runs_dir / self.recipe.name

    def stage_folder(self, name: str) -> Path:
        """Folder of a stage; for `experts`, the one that holds the K expert folders."""
        return self.folder / name

    def expert_folder(self, k: int) -> Path:
        """Folder of expert k, `experts/003`."""
        return self.folder / "experts" / f"{k:03d}"

    def log_file(self, name: str) -> Path:
        """Where the output of a stage's process goes; outside the stage folders, which may be emptied."""
        return self.folder / "logs" / f"{name}.log"


def spec_of(name: str, method: ModelMethod) -> StageSpec:
    """Return the row of a stage.

    Raises:
        L0MoEError: the method has no such stage; the message names the nearest one.
    """
    rows = {spec.name: spec for spec in chain(method)}
    if name in rows:
        return rows[name]
    of_method = "" if method == "l0moe" else f" of method {method}"
    raise L0MoEError(
        f"There is no stage {name!r}{of_method}{nearest(name, tuple(rows))}; the stages are {', '.join(rows)}."
    )


def selection(method: ModelMethod, first: str | None, last: str | None) -> tuple[StageSpec, ...]:
    """Return the rows of a method from stage `first` to stage `last`, both included."""
    rows = chain(method)
    start = rows.index(spec_of(first, method)) if first else 0
    stop = rows.index(spec_of(last, method)) if last else len(rows) - 1
    if start > stop:
        names = ", ".join(spec.name for spec in rows)
        raise L0MoEError(f"--from {first} comes after --until {last} in the chain {names}; exchange the two.")
    return rows[start : stop + 1]


def config_hash(name: str, recipe: Recipe) -> str:
    """Return the hash of the settings that decide a stage's result: its own and those of the stages before it.

    A dtype that is still `auto` counts as float32; commands put the machine's choice in its place, see `machine.py`.
    """
    spec = spec_of(name, recipe.method)
    recipe = recipe.settled()
    own = {path: _setting(recipe, path) for path in spec.settings}
    own |= {path: value for path in spec.added if (value := _setting(recipe, path)) is not None}
    before = {previous: config_hash(previous, recipe) for previous in spec.inputs}
    return section_hash(name, own, before)


def stages(run: Run, name: str) -> tuple[StageFolder, ...]:
    """Return what has to be finished for a stage: one folder, or for `experts` one folder for each expert."""
    spec = spec_of(name, run.recipe.method)
    inputs = tuple(folder for previous in spec.inputs for folder in folders(run, previous))
    digest = config_hash(name, run.recipe)
    beside = (run.folder / "summary.json",) if name == "report" else ()
    return tuple(
        StageFolder(name=name, folder=folder, config_hash=digest, inputs=inputs, beside=beside)
        for folder in folders(run, name)
    )


def stage_command(run: Run, name: str, *, python: str = sys.executable) -> list[str]:
    """Return the command of one stage as words."""
    words = [python, "-m", "megatron_l0moe", name, str(run.recipe_file), "--runs-dir", str(run.runs_dir)]
    return words if run.verify else [*words, "--no-verify"]


def folders(run: Run, name: str) -> tuple[Path, ...]:
    """Return the folders that a stage fills, one marker in each."""
    if name == "experts":
        return tuple(run.expert_folder(k) for k in range(run.recipe.model.num_experts))
    return (run.stage_folder(name),)


def _setting(recipe: Recipe, path: str) -> Any:
    value: Any = recipe
    for part in path.split("."):
        value = getattr(value, part)
    if path.endswith(".flags"):
        return {name: flag for name, flag in value.items() if not name.startswith(FREE_FLAGS)}
    return value.model_dump(exclude=HASHED_APART) if isinstance(value, BaseModel) else value


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the scripts of a run lie and its logs go."""

    scripts: Path
    logs: Path

    def script(self, name: str) -> Path:
        """Return the script of a stage."""
        return self.scripts / f"{name}.sbatch"

    def log(self, name: str) -> Path:
        """Return the log of a stage's job, with Slurm's placeholders for its number."""
        return self.logs / f"{name}-{'%A_%a' if name == 'experts' else '%j'}.log"


def place_of(run: Run) -> Place:
    """Return the places in the run's own folder."""
    return Place(scripts=run.folder / "slurm", logs=run.folder / "slurm" / "logs")

"""What runs.yaml holds: rows of methods and their seeds, each a change of one common recipe."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, model_validator
from settings import Place, TrainingSettings, parse

from megatron_l0moe.chain.machine import begun
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.layout import Flags, RecipePart
from megatron_l0moe.recipe.recipe import ModelMethod, load_recipe, only_l0moe
from megatron_l0moe.runs.stage_folder import write_text
from megatron_l0moe.runs.stages import Run

Kind = Literal["l0moe", "dense-further", "dense-small"]
TableName = Literal["comparison", "ablations", "changes", "sweeps"]


class Row(RecipePart):
    """One method."""

    table: TableName
    """Where its results stand: like the paper's Table 2, 3 or 4; changes are of single settings, and ours."""
    kind: Kind = "l0moe"
    """dense-further: the base, trained on. dense-small: a dense model of the L0-MoE's active width."""
    method: ModelMethod = "l0moe"
    """Of the recipe; keys of the common recipe that the method does not have are left out."""
    seeds: list[int] | None = Field(default=None, min_length=1)
    recipe: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Changes of the common recipe, section by section; of a yardstick, of the L0-MoE that it is compared with."""
    dense: dict[str, Any] = Field(default_factory=dict)
    """Changes of the yardsticks' common training."""


class DenseSettings(RecipePart):
    """Training of the yardsticks; their steps follow from the L0-MoE's tokens."""

    global_batch_size: int = Field(ge=1)
    micro_batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    warmup_share: float = Field(ge=0, lt=1)
    save_interval: int = Field(ge=1)
    processes: int = Field(default=1, ge=1)
    flags: Flags = Field(default_factory=dict)

    def training(self, row: Row, steps: int, seed: int) -> TrainingSettings:
        """Return the settings of one run."""
        return TrainingSettings.model_validate(self.model_dump() | row.dense | {"steps": steps, "seed": seed})


class ControlSettings(RecipePart):
    """Ways to hold the retention, compared on one expert of all domains."""

    steps: int = Field(ge=10)
    seeds: list[int] = Field(min_length=1)
    """Of the gates' noise."""
    flags: dict[str, Flags]
    """By name, on top of the common recipe's for an expert run."""


class RunsTable(RecipePart):
    """All rows."""

    seeds: list[int] = Field(min_length=1)
    recipe: dict[str, dict[str, Any]]
    dense: DenseSettings
    reference: str
    """The row that stands in all tables and that the ablations are compared with."""
    drawn: list[str]
    """Rows whose retention and router load are plotted."""
    rows: dict[str, Row]
    control: ControlSettings | None = None
    """None: the step `control` does nothing."""

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for name in (self.reference, *self.drawn):
            if name not in self.rows:
                raise ValueError(f"reference and drawn must name rows, and there is no row {name!r}")
        return self

    def cases(self, only: list[str] | None = None) -> list["Case"]:
        """Return the runs of all rows, or those named as ROW or ROW-SEED, one seed of every row before the next.

        Raises:
            L0MoEError: a name is no row and no run.
        """
        rows = list(self.rows)
        cases = [Case(row, seed, one) for row, one in self.rows.items() for seed in one.seeds or self.seeds]
        names = {name for case in cases for name in (case.row, case.name)}
        for name in only or []:
            if name not in names:
                raise L0MoEError(f"runs.yaml has no row {name!r}; its rows are {', '.join(rows)}.")
        wanted = [case for case in cases if not only or case.row in only or case.name in only]
        return sorted(wanted, key=lambda case: (case.seed, rows.index(case.row)))

    def first_cases(self) -> list["Case"]:
        """Return the first seed of every row."""
        return [Case(name, (row.seeds or self.seeds)[0], row) for name, row in self.rows.items()]


@dataclass(frozen=True)
class Case:
    """One run."""

    row: str
    seed: int
    settings: Row

    @property
    def name(self) -> str:
        """Of its folder and its result."""
        return f"{self.row}-{self.seed}"


def load_table(file: Path) -> RunsTable:
    """Read runs.yaml."""
    return parse(RunsTable, file)


def chain_run(place: Place, table: RunsTable, case: Case) -> Run:
    """Return the chain's run of a case, its recipe written to methods/NAME.yaml.

    Raises:
        L0MoEError: the recipe is not valid.
    """
    recipe, method = copy.deepcopy(table.recipe), case.settings.method
    if method != "l0moe":
        for section, key in only_l0moe():
            recipe.get(section, {}).pop(key, None)
    for section, changes in case.settings.recipe.items():
        recipe.setdefault(section, {}).update(changes)
    recipe["model"]["path"] = str(place.base_model)
    recipe["data"]["corpus"] = str(place.root / "corpus" / "train")
    folder = place.root / "methods"
    file = folder / f"{case.name}.yaml"
    head = {"name": case.name, "seed": case.seed, "method": method}
    write_text(file, yaml.safe_dump(head | recipe, sort_keys=False))
    return begun(Run(recipe=load_recipe(file), recipe_file=file, runs_dir=folder))

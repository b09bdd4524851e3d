"""What ties tensors of a Hugging Face checkpoint to tensors of a Megatron checkpoint, and checks of names and shapes.

A rule (`rules.py`) knows the names and shapes of both sides and goes through its tensors in blocks of rows (indices of
dimension 0), so that a conversion holds a block at a time however large the tensors are, and of `Experts` one expert.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_l0moe.errors import L0MoEError, nearest

Shape = tuple[int, ...]

# Values of a block: 8 MB in bfloat16. Smaller ones are slower, since each becomes a chunk of the checkpoint.
BLOCK_VALUES = 2**22


class ReadRows(Protocol):
    """Read rows `begin` up to and without `end` of a tensor; by default all of them."""

    def __call__(self, name: str, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Return the rows in the dtype of the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The rows of a tensor that begin at `begin`."""

    name: str
    tensor: torch.Tensor
    begin: int
    rows: int
    """Of the whole tensor."""

    @property
    def shape(self) -> Shape:
        """Of the whole tensor."""
        return (self.rows, *self.tensor.shape[1:])


class Rule(ABC):
    """One entry of a family's table."""

    @abstractmethod
    def hf_shapes(self) -> dict[str, Shape]:
        """Names and shapes on the Hugging Face side."""

    @abstractmethod
    def megatron_shapes(self) -> dict[str, Shape]:
        """Names and shapes on Megatron's side."""

    @abstractmethod
    def to_megatron(self, read: ReadRows) -> Iterator[Piece]:
        """Convert; `read` gives Hugging Face tensors."""

    @abstractmethod
    def to_hf(self, read: ReadRows) -> Iterator[Piece]:
        """Convert; `read` gives Megatron tensors. Each tensor's pieces come in order and without others between."""


def blocks(shape: Shape) -> Iterator[tuple[int, int]]:
    """Cut the rows of a tensor, or of whatever dimension 0 counts, into [begin, end) of about `BLOCK_VALUES` values."""
    step = max(1, BLOCK_VALUES // max(1, math.prod(shape[1:])))
    for begin in range(0, shape[0], step):
        yield begin, min(begin + step, shape[0])


def check_names(found: set[str], expected: set[str], where: str) -> None:
    """Raise when tensors are unknown or missing, naming the first of both; every tensor is used exactly once."""
    unknown, missing = sorted(found - expected), sorted(expected - found)
    problems = []
    if unknown:
        problems.append(
            f"holds the tensor {unknown[0]}, which the model that its config describes does not have"
            f"{nearest(unknown[0], expected)}{_more(unknown)}"
        )
    if missing:
        problems.append(
            f"lacks the tensor {missing[0]}, which the model that its config describes needs{_more(missing)}"
        )
    if problems:
        raise L0MoEError(f"{where} {', and '.join(problems)}.")


def check_shape(name: str, found: Sequence[int], expected: Mapping[str, Shape], where: str) -> None:
    """Raise when a tensor has another shape than the model's sizes give."""
    if tuple(found) != expected[name]:
        raise L0MoEError(
            f"{where}: the tensor {name} has the shape {list(found)}, but the model that its config "
            f"describes needs {list(expected[name])}."
        )


def hf_shapes(rules: Sequence[Rule]) -> dict[str, Shape]:
    """Names and shapes of all Hugging Face tensors of a table, each of one rule only."""
    return _merged([rule.hf_shapes() for rule in rules])


def megatron_shapes(rules: Sequence[Rule]) -> dict[str, Shape]:
    """Names and shapes of all Megatron tensors of a table, each of one rule only."""
    return _merged([rule.megatron_shapes() for rule in rules])


def _merged(parts: Sequence[dict[str, Shape]]) -> dict[str, Shape]:
    merged: dict[str, Shape] = {}
    for part in parts:
        twice = merged.keys() & part.keys()
        assert not twice, f"two rules use {sorted(twice)}"
        merged.update(part)
    return merged


def _more(names: Sequence[str]) -> str:
    return f" ({len(names) - 1} more like it)" if len(names) > 1 else ""

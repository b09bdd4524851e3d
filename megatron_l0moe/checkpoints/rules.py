"""The kinds of rules that tie Hugging Face tensors to Megatron tensors, each in both directions, with checks of names.

A rule knows the names and shapes of both sides and goes through its tensors in blocks of rows (indices of dimension 0),
so that a conversion holds a block at a time however large the tensors are, and of `Experts` one expert.

H = hidden, F = FFN channels, E = channels of one expert, K = experts, D = head_dim,
A = attention heads, G = query groups (KV heads). All sizes are global.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, override

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
    total_rows: int
    """The rows of the whole tensor."""

    @property
    def shape(self) -> Shape:
        """The shape of the whole tensor, not of this piece."""
        return (self.total_rows, *self.tensor.shape[1:])


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


@dataclass(frozen=True, kw_only=True)
class Rename(Rule):
    """The same tensor under two names."""

    megatron: str
    hf: str
    shape: Shape

    @override
    def hf_shapes(self) -> dict[str, Shape]:
        return {self.hf: self.shape}

    @override
    def megatron_shapes(self) -> dict[str, Shape]:
        return {self.megatron: self.shape}

    @override
    def to_megatron(self, read: ReadRows) -> Iterator[Piece]:
        yield from _renamed(read, self.hf, self.megatron, self.shape)

    @override
    def to_hf(self, read: ReadRows) -> Iterator[Piece]:
        yield from _renamed(read, self.megatron, self.hf, self.shape)


@dataclass(frozen=True, kw_only=True)
class QKV(Rule):
    """q, k, v projections in one Megatron tensor, interleaved per query group: [q.., k, v] of group 0, 1, ...

    Weights are [A*D, H], [G*D, H], [G*D, H] against [(A + 2G)*D, H]; biases lack H.
    """

    megatron: str
    """Name without the suffix `.weight` or `.bias`."""
    hf: str
    """Name of the attention block; q_proj, k_proj, v_proj are appended."""
    suffix: str
    """`weight` or `bias`."""
    heads: int
    groups: int
    head_dim: int
    hidden: int
    interleaved_rope: bool = False
    """Whether the Hugging Face side rotates neighbours (2i, 2i + 1) and not halves (i, i + D/2)."""

    @override
    def hf_shapes(self) -> dict[str, Shape]:
        rows = {"q": self.heads, "k": self.groups, "v": self.groups}
        return {self._hf(n): (count * self.head_dim, *self._tail()) for n, count in rows.items()}

    @override
    def megatron_shapes(self) -> dict[str, Shape]:
        rows = (self.heads + 2 * self.groups) * self.head_dim
        return {f"{self.megatron}.{self.suffix}": (rows, *self._tail())}

    @override
    def to_megatron(self, read: ReadRows) -> Iterator[Piece]:
        q_rows, group_rows = self._group_rows()
        for first, last in blocks((self.groups, group_rows, *self._tail())):
            q = read(self._hf("q"), first * q_rows, last * q_rows)
            k, v = (read(self._hf(n), first * self.head_dim, last * self.head_dim) for n in "kv")
            if self.interleaved_rope:
                q, k = (half_split_rows(x, self.head_dim) for x in (q, k))
            parts = [
                x.view(last - first, -1, *x.shape[1:]) for x in (q, k, v)
            ]  # [groups, rows of a group, H]
            merged = torch.cat(parts, dim=1).flatten(0, 1)
            yield Piece(
                name=f"{self.megatron}.{self.suffix}",
                tensor=merged,
                begin=first * group_rows,
                total_rows=self.groups * group_rows,
            )

    @override
    def to_hf(self, read: ReadRows) -> Iterator[Piece]:
        q_rows, group_rows = self._group_rows()
        within = {
            "q": (0, q_rows),
            "k": (q_rows, self.head_dim),
            "v": (q_rows + self.head_dim, self.head_dim),
        }
        for n, (offset, count) in within.items():
            for group in range(self.groups):
                begin = group * group_rows + offset
                x = read(f"{self.megatron}.{self.suffix}", begin, begin + count)
                if self.interleaved_rope and n != "v":
                    x = interleaved_rows(x, self.head_dim)
                yield Piece(name=self._hf(n), tensor=x, begin=group * count, total_rows=self.groups * count)

    def _group_rows(self) -> tuple[int, int]:
        """Return the rows of q in a group, and all rows of a group."""
        q_rows = self.heads // self.groups * self.head_dim
        return q_rows, q_rows + 2 * self.head_dim

    def _hf(self, projection: str) -> str:
        return f"{self.hf}.{projection}_proj.{self.suffix}"

    def _tail(self) -> Shape:
        return (self.hidden,) if self.suffix == "weight" else ()


@dataclass(frozen=True, kw_only=True)
class GatedMLP(Rule):
    """Gate [F, H] and up [F, H] stacked to Megatron's linear_fc1 [2F, H], gate first."""

    megatron: str
    gate: str
    up: str
    ffn: int
    hidden: int

    @override
    def hf_shapes(self) -> dict[str, Shape]:
        return {self.gate: (self.ffn, self.hidden), self.up: (self.ffn, self.hidden)}

    @override
    def megatron_shapes(self) -> dict[str, Shape]:
        return {self.megatron: (2 * self.ffn, self.hidden)}

    @override
    def to_megatron(self, read: ReadRows) -> Iterator[Piece]:
        for offset, name in ((0, self.gate), (self.ffn, self.up)):
            for begin, end in blocks((self.ffn, self.hidden)):
                tensor = read(name, begin, end)
                yield Piece(name=self.megatron, tensor=tensor, begin=offset + begin, total_rows=2 * self.ffn)

    @override
    def to_hf(self, read: ReadRows) -> Iterator[Piece]:
        for offset, name in ((0, self.gate), (self.ffn, self.up)):
            for begin, end in blocks((self.ffn, self.hidden)):
                tensor = read(self.megatron, offset + begin, offset + end)
                yield Piece(name=name, tensor=tensor, begin=begin, total_rows=self.ffn)


@dataclass(frozen=True, kw_only=True)
class Experts(Rule):
    """K gated MLPs: Megatron stacks them to linear_fc1 [K, 2E, H] and linear_fc2 [K, H, E]."""

    fc1: str
    fc2: str
    hf: str
    """Name of one expert, with `{expert}`; gate_proj, up_proj and down_proj are appended."""
    num_experts: int
    expert_ffn: int
    hidden: int

    @override
    def hf_shapes(self) -> dict[str, Shape]:
        wide, tall = (self.expert_ffn, self.hidden), (self.hidden, self.expert_ffn)
        sides = {"gate": wide, "up": wide, "down": tall}
        return {self._hf(k, n): shape for k in range(self.num_experts) for n, shape in sides.items()}

    @override
    def megatron_shapes(self) -> dict[str, Shape]:
        return {
            self.fc1: (self.num_experts, 2 * self.expert_ffn, self.hidden),
            self.fc2: (self.num_experts, self.hidden, self.expert_ffn),
        }

    @override
    def to_megatron(self, read: ReadRows) -> Iterator[Piece]:
        for k in range(self.num_experts):
            fc1 = torch.cat([read(self._hf(k, "gate")), read(self._hf(k, "up"))])
            yield Piece(name=self.fc1, tensor=fc1[None], begin=k, total_rows=self.num_experts)
            fc2 = read(self._hf(k, "down"))
            yield Piece(name=self.fc2, tensor=fc2[None], begin=k, total_rows=self.num_experts)

    @override
    def to_hf(self, read: ReadRows) -> Iterator[Piece]:
        for k in range(self.num_experts):
            gate, up = read(self.fc1, k, k + 1)[0].chunk(2)
            yield _whole(self._hf(k, "gate"), gate)
            yield _whole(self._hf(k, "up"), up)
            yield _whole(self._hf(k, "down"), read(self.fc2, k, k + 1)[0])

    def _hf(self, expert: int, projection: str) -> str:
        return f"{self.hf.format(expert=expert)}.{projection}_proj.weight"


@dataclass(frozen=True, kw_only=True)
class Zeros(Rule):
    """A tensor that the Hugging Face layout asks for and that must be zero (fp32); Megatron has none."""

    hf: str
    shape: Shape

    @override
    def hf_shapes(self) -> dict[str, Shape]:
        return {self.hf: self.shape}

    @override
    def megatron_shapes(self) -> dict[str, Shape]:
        return {}

    @override
    def to_megatron(self, read: ReadRows) -> Iterator[Piece]:
        if bool(read(self.hf).count_nonzero()):
            raise L0MoEError(f"The tensor {self.hf} must be all zeros to be imported, but it is not.")
        return iter(())

    @override
    def to_hf(self, read: ReadRows) -> Iterator[Piece]:
        yield _whole(self.hf, torch.zeros(self.shape, dtype=torch.float32))


def _renamed(read: ReadRows, source: str, target: str, shape: Shape) -> Iterator[Piece]:
    for begin, end in blocks(shape):
        yield Piece(name=target, tensor=read(source, begin, end), begin=begin, total_rows=shape[0])


def _whole(name: str, tensor: torch.Tensor) -> Piece:
    return Piece(name=name, tensor=tensor, begin=0, total_rows=tensor.shape[0])


def interleaved_rows(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of q or k, [n*D, ...], from half-split RoPE (i, i + D/2) to interleaved (2i, 2i + 1)."""
    heads = x.view(-1, 2, head_dim // 2, *x.shape[1:])
    return heads.transpose(1, 2).reshape(x.shape)


def half_split_rows(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Undo `interleaved_rows`."""
    heads = x.reshape(-1, head_dim // 2, 2, *x.shape[1:])
    return heads.transpose(1, 2).reshape(x.shape)

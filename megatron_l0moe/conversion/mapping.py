"""Rules that tie tensors of a Hugging Face checkpoint to tensors of a Megatron checkpoint, in both directions.

A rule knows the names and shapes of both sides and reads its inputs when it needs them, so that a conversion
holds one rule's tensors at a time, and of `Experts` one expert's.

H = hidden, F = FFN channels, E = channels of one expert, K = experts, D = head_dim,
A = attention heads, G = query groups (KV heads). All sizes are global.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, override

import torch

from megatron_l0moe.errors import L0MoEError, nearest

Shape = tuple[int, ...]
ReadHF = Callable[[str], torch.Tensor]
Tensors = Iterator[tuple[str, torch.Tensor]]


class ReadMegatron(Protocol):
    """Read a tensor, or one row of it (index of dimension 0)."""

    def __call__(self, name: str, row: int | None = None) -> torch.Tensor:
        """Return the tensor in the dtype of the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A Megatron tensor, or one row of it (an expert's part of a tensor stacked over experts)."""

    name: str
    tensor: torch.Tensor
    row: int | None = None
    rows: int | None = None
    """Size of dimension 0 when `row` is given."""


class Rule(ABC):
    """One entry of a family's table."""

    @abstractmethod
    def hf_shapes(self) -> dict[str, Shape]:
        """Names and shapes on the Hugging Face side."""

    @abstractmethod
    def megatron_shapes(self) -> dict[str, Shape]:
        """Names and shapes on Megatron's side."""

    @abstractmethod
    def to_megatron(self, read: ReadHF) -> Iterator[Piece]:
        """Convert; `read` gives Hugging Face tensors."""

    @abstractmethod
    def to_hf(self, read: ReadMegatron) -> Tensors:
        """Convert; `read` gives Megatron tensors."""


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
    def to_megatron(self, read: ReadHF) -> Iterator[Piece]:
        yield Piece(name=self.megatron, tensor=read(self.hf))

    @override
    def to_hf(self, read: ReadMegatron) -> Tensors:
        yield self.hf, read(self.megatron)


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
    def to_megatron(self, read: ReadHF) -> Iterator[Piece]:
        q, k, v = (read(self._hf(n)) for n in "qkv")
        if self.interleaved_rope:
            q, k = (half_split_rows(x, self.head_dim) for x in (q, k))
        parts = [x.view(self.groups, -1, *x.shape[1:]) for x in (q, k, v)]  # [G, rows of a group, H]
        merged = torch.cat(parts, dim=1).flatten(0, 1)
        yield Piece(name=f"{self.megatron}.{self.suffix}", tensor=merged)

    @override
    def to_hf(self, read: ReadMegatron) -> Tensors:
        merged = read(f"{self.megatron}.{self.suffix}")
        grouped = merged.view(self.groups, -1, *merged.shape[1:])
        first = self.heads // self.groups * self.head_dim  # rows of q in a group
        parts = (grouped[:, :first], *grouped[:, first:].chunk(2, dim=1))
        for n, part in zip("qkv", parts, strict=True):
            x = part.flatten(0, 1)
            if self.interleaved_rope and n != "v":
                x = interleaved_rows(x, self.head_dim)
            yield self._hf(n), x

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
    def to_megatron(self, read: ReadHF) -> Iterator[Piece]:
        yield Piece(name=self.megatron, tensor=torch.cat([read(self.gate), read(self.up)]))

    @override
    def to_hf(self, read: ReadMegatron) -> Tensors:
        gate, up = read(self.megatron).chunk(2)
        yield self.gate, gate
        yield self.up, up


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
    def to_megatron(self, read: ReadHF) -> Iterator[Piece]:
        for k in range(self.num_experts):
            fc1 = torch.cat([read(self._hf(k, "gate")), read(self._hf(k, "up"))])
            yield Piece(name=self.fc1, tensor=fc1, row=k, rows=self.num_experts)
            yield Piece(name=self.fc2, tensor=read(self._hf(k, "down")), row=k, rows=self.num_experts)

    @override
    def to_hf(self, read: ReadMegatron) -> Tensors:
        for k in range(self.num_experts):
            gate, up = read(self.fc1, k).chunk(2)
            yield self._hf(k, "gate"), gate
            yield self._hf(k, "up"), up
            yield self._hf(k, "down"), read(self.fc2, k)

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
    def to_megatron(self, read: ReadHF) -> Iterator[Piece]:
        if bool(read(self.hf).count_nonzero()):
            raise L0MoEError(f"The tensor {self.hf} must be all zeros to be imported, but it is not.")
        return iter(())

    @override
    def to_hf(self, read: ReadMegatron) -> Tensors:
        yield self.hf, torch.zeros(self.shape, dtype=torch.float32)


def interleaved_rows(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of q or k, [n*D, ...], from half-split RoPE (i, i + D/2) to interleaved (2i, 2i + 1)."""
    heads = x.view(-1, 2, head_dim // 2, *x.shape[1:])
    return heads.transpose(1, 2).reshape(x.shape)


def half_split_rows(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Undo `interleaved_rows`."""
    heads = x.reshape(-1, head_dim // 2, 2, *x.shape[1:])
    return heads.transpose(1, 2).reshape(x.shape)


def check_names(found: set[str], expected: set[str], where: str) -> None:
    """Raise when a tensor is unknown or missing; every tensor must be used exactly once."""
    unknown = sorted(found - expected)
    if unknown:
        raise L0MoEError(
            f"{where} holds the tensor {unknown[0]}, which the model that its config describes does not have"
            f"{nearest(unknown[0], expected)}{_more(unknown)}."
        )
    missing = sorted(expected - found)
    if missing:
        raise L0MoEError(
            f"{where} lacks the tensor {missing[0]}, which the model that its config describes needs"
            f"{_more(missing)}."
        )


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

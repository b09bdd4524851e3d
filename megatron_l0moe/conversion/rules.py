"""The kinds of rules that tie Hugging Face tensors to Megatron tensors, each in both directions.

H = hidden, F = FFN channels, E = channels of one expert, K = experts, D = head_dim,
A = attention heads, G = query groups (KV heads). All sizes are global.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import override

import torch

from megatron_l0moe.conversion.mapping import Piece, ReadRows, Rule, Shape, blocks
from megatron_l0moe.errors import L0MoEError


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
                rows=self.groups * group_rows,
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
                yield Piece(name=self._hf(n), tensor=x, begin=group * count, rows=self.groups * count)

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
                yield Piece(name=self.megatron, tensor=tensor, begin=offset + begin, rows=2 * self.ffn)

    @override
    def to_hf(self, read: ReadRows) -> Iterator[Piece]:
        for offset, name in ((0, self.gate), (self.ffn, self.up)):
            for begin, end in blocks((self.ffn, self.hidden)):
                tensor = read(self.megatron, offset + begin, offset + end)
                yield Piece(name=name, tensor=tensor, begin=begin, rows=self.ffn)


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
            yield Piece(name=self.fc1, tensor=fc1[None], begin=k, rows=self.num_experts)
            fc2 = read(self._hf(k, "down"))
            yield Piece(name=self.fc2, tensor=fc2[None], begin=k, rows=self.num_experts)

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
        yield Piece(name=target, tensor=read(source, begin, end), begin=begin, rows=shape[0])


def _whole(name: str, tensor: torch.Tensor) -> Piece:
    return Piece(name=name, tensor=tensor, begin=0, rows=tensor.shape[0])


def interleaved_rows(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of q or k, [n*D, ...], from half-split RoPE (i, i + D/2) to interleaved (2i, 2i + 1)."""
    heads = x.view(-1, 2, head_dim // 2, *x.shape[1:])
    return heads.transpose(1, 2).reshape(x.shape)


def half_split_rows(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Undo `interleaved_rows`."""
    heads = x.reshape(-1, head_dim // 2, 2, *x.shape[1:])
    return heads.transpose(1, 2).reshape(x.shape)

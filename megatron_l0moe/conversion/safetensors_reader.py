"""Read one safetensors file by rows: its tensors are read with `read`, not mapped, so that memory holds what is in use.

A file is: 8 bytes little-endian header length, JSON header (may end in spaces), then the tensors' bytes in the
order of their offsets, without gaps (https://github.com/huggingface/safetensors#format).
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runtime.json_files import parse_json

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}
_MAX_HEADER_BYTES = 100_000_000  # of the format
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class _Entry:
    """Where one tensor lies: bytes [begin, end) of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """The tensors of one file, read when asked for.

    Raises:
        L0MoEError: the file is truncated or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header, data_begin = _read_header(path)
        metadata = header.pop("__metadata__", None)
        self.metadata: dict[str, str] = metadata if isinstance(metadata, dict) else {}
        try:
            self._entries = {name: _entry(value, data_begin) for name, value in header.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path) from error
        if any(entry.end > path.stat().st_size for entry in self._entries.values()):
            raise _damaged(path)
        if both := first_overlap({name: (entry.begin, entry.end) for name, entry in self._entries.items()}):
            raise L0MoEError(
                f"{path} says that the tensors {both[0]} and {both[1]} lie in the same bytes; download it again."
            )

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return self._entries[name].shape

    def read(self, name: str, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Read rows (indices of dimension 0) `begin` up to and without `end` of a tensor; by default all of it."""
        entry = self._entries[name]
        if entry.dtype not in _DTYPES:
            raise L0MoEError(
                f"{self.path}: the tensor {name} is of type {entry.dtype}, which is not supported; convert "
                "the model to bfloat16 or float32 first."
            )
        dtype, shape, skipped = _DTYPES[entry.dtype], entry.shape, 0
        if shape:
            stop = shape[0] if end is None else end
            assert 0 <= begin <= stop <= shape[0], (name, begin, end)
            skipped, shape = begin * math.prod(shape[1:]), (stop - begin, *shape[1:])
        return read_values(self.path, entry.begin + skipped * dtype.itemsize, shape, dtype)


def first_overlap(spans: Mapping[str, tuple[int, int]]) -> tuple[str, str] | None:
    """Return the names of two spans of bytes [begin, end) that share some, None where there are none."""
    ordered = sorted((begin, end, name) for name, (begin, end) in spans.items() if begin < end)
    for (_, end, name), (begin, _, other) in pairwise(ordered):
        if begin < end:
            return name, other
    return None


def read_values(file: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Read a contiguous tensor whose bytes begin at `offset` of a file.

    Raises:
        L0MoEError: the file ends before.
    """
    tensor = torch.empty(shape, dtype=dtype)
    if not tensor.numel():
        return tensor
    rest = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
    with file.open("rb", buffering=0) as stream:
        stream.seek(offset)
        while rest:
            count = stream.readinto(rest)
            if not count:
                raise L0MoEError(f"{file} became shorter while it was read; make or download it again.")
            rest = rest[count:]
    return tensor


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the JSON header and where the tensors' bytes begin."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size or length > _MAX_HEADER_BYTES:
            raise _damaged(path)
        try:
            header = parse_json(file.read(length), "the header", "download it again", finite=False)
        except L0MoEError as error:
            raise _damaged(path) from error
    return header, 8 + length


def _entry(value: Any, data_begin: int) -> _Entry:
    """Return one tensor's entry of a header; KeyError, TypeError or ValueError when it cannot be one."""
    dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)) or begin > end:
        raise ValueError(f"shape {shape}, offsets {begin} to {end}")
    # Types that are not supported are refused only when they are read, so their size is not known here.
    if dtype in _DTYPES and end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError(f"{end - begin} bytes for the shape {shape} of {dtype}")
    return _Entry(dtype, shape, data_begin + begin, data_begin + end)


def _damaged(path: Path) -> L0MoEError:
    return L0MoEError(
        f"{path} is truncated or not a safetensors file ({path.stat().st_size} bytes); download it again."
    )

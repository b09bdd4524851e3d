"""Read and write Hugging Face safetensors checkpoints one tensor at a time.

A file is: 8 bytes little-endian header length, JSON header (may end in spaces), then the tensors' bytes in the
order of their offsets, without gaps (https://github.com/huggingface/safetensors#format).
"""

import json
import math
import os
import shutil
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from megatron_l0moe.data.manifest import write_text
from megatron_l0moe.errors import L0MoEError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_SHARD_BYTES = 5 * 10**9
CHECKED_AT_ONCE = 2**20  # values; their temporaries stay in the cache
# Room in the header for one tensor's dtype, shape and offsets; far above what they need.
_HEADER_BYTES_PER_TENSOR = 160
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


class SafetensorsFolder:
    """All tensors of a Hugging Face checkpoint folder, read when asked for.

    Files are read, not mapped, so that memory holds only the tensors in use.

    Raises:
        L0MoEError: no weights, pickled weights only, a missing, truncated or inconsistent shard.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[str, _Entry] = {}
        for name in _shards(folder):
            for tensor, entry in _read_header(folder / name).items():
                if tensor in self._entries:
                    raise L0MoEError(
                        f"{folder}: the tensor {tensor} is in both {self._entries[tensor].file.name} and "
                        f"{name}; remove the file that does not belong."
                    )
                self._entries[tensor] = entry
        index = folder / INDEX_NAME
        if index.is_file():
            for tensor, name in _weight_map(index).items():
                if tensor not in self._entries or self._entries[tensor].file.name != name:
                    raise L0MoEError(
                        f"{index} says that {name} holds the tensor {tensor}, but it does not; download the "
                        "checkpoint again."
                    )

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return self._entries[name].shape

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        entry = self._entries[name]
        if entry.dtype not in _DTYPES:
            raise L0MoEError(
                f"{entry.file}: the tensor {name} is of type {entry.dtype}, which is not supported; convert "
                "the model to bfloat16 or float32 first."
            )
        buffer = bytearray(entry.end - entry.begin)
        with entry.file.open("rb") as file:
            file.seek(entry.begin)
            file.readinto(buffer)
        if not buffer:
            return torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
        return torch.frombuffer(buffer, dtype=_DTYPES[entry.dtype]).view(entry.shape)


@dataclass(frozen=True)
class _Entry:
    """Where one tensor lies: bytes [begin, end) of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _shards(folder: Path) -> list[str]:
    index = folder / INDEX_NAME
    if index.is_file():
        return sorted(set(_weight_map(index).values()))
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        if pickled:
            raise L0MoEError(
                f"{folder} holds pickled weights ({pickled[0]}), which are not loaded because they can run "
                "code; convert them with transformers' save_pretrained, which writes safetensors."
            )
        raise L0MoEError(
            f"{folder} holds no *.safetensors file; give the folder of a Hugging Face checkpoint."
        )
    return files


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise L0MoEError(f"{index} is not a valid safetensors index; download it again.") from error


def _read_header(path: Path) -> dict[str, _Entry]:
    if not path.is_file():
        raise L0MoEError(f"{path} is missing, but {INDEX_NAME} names it; download the checkpoint again.")
    size = path.stat().st_size
    damaged = f"{path} is truncated or not a safetensors file ({size} bytes); download it again."
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise L0MoEError(damaged)
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise L0MoEError(damaged) from error
    if not isinstance(header, dict):
        raise L0MoEError(damaged)
    header.pop("__metadata__", None)
    try:
        entries = {name: _entry(path, value, 8 + length) for name, value in header.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise L0MoEError(damaged) from error
    if any(entry.end > size for entry in entries.values()):
        raise L0MoEError(damaged)
    return entries


def _entry(path: Path, value: Any, data_begin: int) -> _Entry:
    """Return one tensor's entry of a header; KeyError, TypeError or ValueError when it cannot be one."""
    dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)) or begin > end:
        raise ValueError(f"shape {shape}, offsets {begin} to {end}")
    # Types that are not supported are refused only when they are read, so their size is not known here.
    if dtype in _DTYPES and end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError(f"{end - begin} bytes for the shape {shape} of {dtype}")
    return _Entry(path, dtype, shape, data_begin + begin, data_begin + end)


class SafetensorsWriter:
    """Write tensors as they come into one file, or into shards with an index.

    The files get their final names when the `with` block ends without an error; otherwise nothing is left.

    Args:
        folder: must not hold a checkpoint yet; created when missing.
        names: every tensor that will be written (the header needs room for them).
        max_shard_bytes: a new file is begun when the next tensor would exceed it.
    """

    def __init__(self, folder: Path, names: Iterable[str], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder = folder
        self._expected = set(names)
        self._max_shard_bytes = max_shard_bytes
        self._header_bytes = 64 + sum(len(name) + _HEADER_BYTES_PER_TENSOR for name in self._expected)
        self._header_bytes += -self._header_bytes % 8
        self._partial = folder / f".weights.{os.getpid()}"
        self._shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._size = 0
        self._total = 0

    def __enter__(self) -> "SafetensorsWriter":
        refuse_existing_checkpoint(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._partial.mkdir()
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor of any supported dtype.

        Raises:
            L0MoEError: the tensor holds NaN or infinite values.
        """
        assert name in self._expected, f"{name} was not announced or was written twice"
        refuse_non_finite(name, tensor)
        self._expected.discard(name)
        size = tensor.numel() * tensor.element_size()
        if self._file is None or (self._size and self._size + size > self._max_shard_bytes):
            self._begin_shard()
        assert self._file is not None
        self._shards[-1][name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._size, self._size + size],
        }
        self._file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._size += size
        self._total += size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._end_shard()
            if kind is None:
                assert not self._expected, f"never written: {sorted(self._expected)[:3]}"
                self._publish()
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _begin_shard(self) -> None:
        self._end_shard()
        self._shards.append({})
        self._size = 0
        self._file = (self._partial / f"{len(self._shards)}").open("wb")
        self._file.seek(8 + self._header_bytes)

    def _end_shard(self) -> None:
        if self._file is None:
            return
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._shards[-1]}, separators=(",", ":"))
        encoded = header.encode().ljust(self._header_bytes)
        assert len(encoded) == self._header_bytes
        with self._file:
            self._file.seek(0)
            self._file.write(struct.pack("<Q", self._header_bytes) + encoded)
        self._file = None

    def _publish(self) -> None:
        count = len(self._shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            names = [SINGLE_NAME]
        for i, name in enumerate(names):
            os.replace(self._partial / f"{i + 1}", self.folder / name)
        if count > 1:
            weight_map = {
                tensor: name for name, shard in zip(names, self._shards, strict=True) for tensor in shard
            }
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            write_text(self.folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")


def refuse_existing_checkpoint(folder: Path) -> None:
    """Raise when `folder` already holds weights or a config; a good export is never written over."""
    if folder.exists() and not folder.is_dir():
        raise L0MoEError(f"{folder} is a file; give a folder to write the checkpoint into.")
    for pattern in ("*.safetensors", "config.json"):
        for found in folder.glob(pattern):
            raise L0MoEError(
                f"{folder} already holds a checkpoint ({found.name}); delete it or give another folder."
            )


def refuse_non_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise when a floating-point tensor holds NaN or infinite values."""
    if not tensor.is_floating_point():
        return
    flat = tensor.reshape(-1)
    # In parts, because isfinite makes temporaries of the size of its input.
    parts = [flat[begin : begin + CHECKED_AT_ONCE] for begin in range(0, flat.numel(), CHECKED_AT_ONCE)]
    count = sum(part.numel() - int(torch.isfinite(part).sum()) for part in parts)
    if count:
        raise L0MoEError(
            f"The tensor {name} holds {count} values that are NaN or infinite; the run that made it has "
            "diverged, or the file is damaged: go back to an earlier checkpoint."
        )

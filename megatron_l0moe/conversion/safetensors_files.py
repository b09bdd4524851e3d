"""Read and write Hugging Face safetensors checkpoints by rows; the file's format is that of `safetensors_reader.py`."""

import json
import math
import os
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from megatron_l0moe.conversion.safetensors_reader import DTYPE_NAMES, SafetensorsFile
from megatron_l0moe.data import digests
from megatron_l0moe.data.manifest import write_text
from megatron_l0moe.errors import L0MoEError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth")
MAX_SHARD_BYTES = 5 * 10**9
# Room in the header for one tensor's dtype, shape and offsets; far above what they need.
_HEADER_BYTES_PER_TENSOR = 160


class SafetensorsFolder:
    """All tensors of a Hugging Face checkpoint folder, in one file or in any number of shards, read when asked for.

    Raises:
        L0MoEError: no weights, pickled weights only, a missing, truncated or inconsistent shard.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, SafetensorsFile] = {}
        for name in _shards(folder):
            if not (folder / name).is_file():
                raise L0MoEError(
                    f"{folder / name} is missing, but {INDEX_NAME} names it; download the checkpoint again."
                )
            file = SafetensorsFile(folder / name)
            for tensor in file.names:
                if tensor in self._files:
                    raise L0MoEError(
                        f"{folder}: the tensor {tensor} is in both {self._files[tensor].path.name} and "
                        f"{name}; remove the file that does not belong."
                    )
                self._files[tensor] = file
        index = folder / INDEX_NAME
        if index.is_file():
            for tensor, name in _weight_map(index).items():
                if tensor not in self._files or self._files[tensor].path.name != name:
                    raise L0MoEError(
                        f"{index} says that {name} holds the tensor {tensor}, but it does not; download the "
                        "checkpoint again."
                    )

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    @property
    def paths(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted({file.path for file in self._files.values()})

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return self._files[name].shape(name)

    def read(self, name: str, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Read rows (indices of dimension 0) `begin` up to and without `end` of a tensor; by default all of it."""
        return self._files[name].read(name, begin, end)


def _shards(folder: Path) -> list[str]:
    index = folder / INDEX_NAME
    if index.is_file():
        return sorted(set(_weight_map(index).values()))
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
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
        self._next: tuple[str, int] | None = None
        """The tensor that is half written and its next row."""

    def __enter__(self) -> "SafetensorsWriter":
        refuse_existing_checkpoint(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._partial.mkdir()
        return self

    def write(self, name: str, tensor: torch.Tensor, *, begin: int = 0, rows: int | None = None) -> None:
        """Append a tensor of any supported dtype, or its rows from `begin` on, of `rows` in all.

        The rows of a tensor come in order, and before those of another one.

        Raises:
            L0MoEError: the tensor holds NaN or infinite values.
        """
        assert name in self._expected, f"{name} was not announced or was written twice"
        rows = rows if rows is not None else (tensor.shape[0] if tensor.shape else 1)
        end = begin + (tensor.shape[0] if tensor.shape else 1)
        assert (name, begin) == self._next or (self._next is None and begin == 0), (name, begin, self._next)
        part = f"{name}, rows {begin} to {end - 1}," if end - begin < rows else name
        refuse_non_finite(part, tensor)
        if begin == 0:
            self._begin_tensor(name, tensor.dtype, (rows, *tensor.shape[1:]) if tensor.shape else ())
        assert self._file is not None
        self._file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._next = (name, end)
        if end >= rows:
            self._expected.discard(name)
            self._next = None

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

    def _begin_tensor(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        size = math.prod(shape) * dtype.itemsize
        if self._file is None or (self._size and self._size + size > self._max_shard_bytes):
            self._begin_shard()
        self._shards[-1][name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [self._size, self._size + size],
        }
        self._size += size
        self._total += size

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
        digests.written(self._partial / f"{len(self._shards)}")

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
    if not tensor.numel() or all(math.isfinite(float(end)) for end in torch.aminmax(tensor)):
        return  # both are NaN where one value is; ten times as fast as isfinite of all
    count = tensor.numel() - int(torch.isfinite(tensor).sum())
    raise L0MoEError(
        f"The tensor {name} holds {count} values that are NaN or infinite; the run that made it has "
        "diverged, or the file is damaged: go back to an earlier checkpoint."
    )

"""Read and write Hugging Face safetensors checkpoints by rows, without mapping them: memory holds what is in use.

A file is: 8 bytes little-endian header length, JSON header (may end in spaces), then the tensors' bytes in the
order of their offsets, without gaps (https://github.com/huggingface/safetensors#format).
"""

import json
import logging
import math
import os
import shutil
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs import digests
from megatron_l0moe.runs.stage_folder import write_text
from megatron_l0moe.runtime.json_files import parse_json, read_json

logger = logging.getLogger(__name__)

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
    """Read a contiguous tensor whose bytes begin at `offset` of a file."""
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


INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTER_NAME = "adapter_config.json"
PICKLED = ("*.bin", "*.pt", "*.pth")
_PICKLED_RULE = (
    "{folder} holds pickled weights ({found}), which are not loaded because they can run code; convert them with "
    "transformers' save_pretrained, which writes safetensors."
)
_NAMES_RULE = (
    f"{{folder}} holds {{found}}, but neither {SINGLE_NAME} nor {INDEX_NAME}, by which transformers finds the weights; "
    "give the folder of a Hugging Face checkpoint."
)
_MAX_NAME_BYTES = 255  # of a file system
MAX_SHARD_BYTES = 5 * 10**9
# Room in the header for one tensor's dtype, shape and offsets; far above what they need.
_HEADER_BYTES_PER_TENSOR = 160


class SafetensorsFolder:
    """All tensors of a Hugging Face checkpoint folder, in one file or in any number of shards, read when asked for.

    Of several sets of weights in one folder it reads the one that transformers loads: `model.safetensors`, or else the
    shards that `model.safetensors.index.json` names. Other weight files (of a variant, an original layout, pickled)
    are named in the log and not read.

    Raises:
        L0MoEError: no weights, pickled weights only, an adapter, a missing, truncated or inconsistent shard.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, SafetensorsFile] = {}
        weight_map = _chosen(folder)
        shards = [SINGLE_NAME] if weight_map is None else sorted(set(weight_map.values()))
        for name in shards:
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
        for tensor, name in (weight_map or {}).items():
            if tensor not in self._files or self._files[tensor].path.name != name:
                raise L0MoEError(
                    f"{folder / INDEX_NAME} says that {name} holds the tensor {tensor}, but it does not; download the "
                    "checkpoint again."
                )
        _say_what_is_not_read(folder, set(shards))

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


def _chosen(folder: Path) -> dict[str, str] | None:
    """Return the index of the set that transformers loads; None: the single file."""
    if (folder / ADAPTER_NAME).is_file():
        raise L0MoEError(
            f"{folder / ADAPTER_NAME} says that the folder is an adapter of another model, which transformers would "
            "load instead of the weights beside it; merge the adapter into its model first, or remove the file."
        )
    if (folder / SINGLE_NAME).is_file():
        return None
    if (folder / INDEX_NAME).is_file():
        return _weight_map(folder / INDEX_NAME)
    for patterns, rule in ((PICKLED, _PICKLED_RULE), (("*.safetensors", "*.gguf"), _NAMES_RULE)):
        found = sorted(path.name for pattern in patterns for path in folder.glob(pattern))
        if found:
            raise L0MoEError(rule.format(folder=folder, found=found[0]))
    raise L0MoEError(f"{folder} holds no *.safetensors file; give the folder of a Hugging Face checkpoint.")


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor; every file lies in the folder itself."""
    found = read_json(index, "download it again", finite=False).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise L0MoEError(f"{index} is not a valid safetensors index (no weight_map); download it again.")
    for tensor, name in found.items():
        plain = isinstance(name, str) and Path(name).name == name and len(name.encode()) <= _MAX_NAME_BYTES
        if not plain or "\0" in name or not name.endswith(".safetensors"):
            raise L0MoEError(
                f"{index} gives {str(name)[:60]!r} as the file of the tensor {tensor[:60]}, but it must be the name of "
                "a *.safetensors file in the same folder; download it again."
            )
    return dict(found)


def _say_what_is_not_read(folder: Path, read: set[str]) -> None:
    others = sorted(
        path.name
        for pattern in ("*.safetensors", INDEX_NAME, "*.gguf", *PICKLED)
        for path in folder.glob(pattern)
        if path.name not in read and not (path.name == INDEX_NAME and SINGLE_NAME not in read)
    )
    if others:
        logger.warning(
            "%s: the weights are read from %s, as transformers does; not read: %s",
            folder,
            SINGLE_NAME if SINGLE_NAME in read else INDEX_NAME,
            ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else ""),
        )


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

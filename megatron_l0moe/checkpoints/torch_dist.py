"""Read and write Megatron torch_dist checkpoints by rows of a tensor, in one process without process groups.

The format is that of torch.distributed.checkpoint (DCP): `*.distcp` files hold chunks of tensors, each saved by
`torch.save`; the pickled `.metadata` says where every chunk of every tensor lies. Megatron adds metadata.json
(the format's name) and the object `common_state` (arguments, iteration, our own settings); its loader
(megatron/core/dist_checkpointing/serialization.py, `load`) reshards to any TP/PP/EP layout from the chunks.

What torch.save writes is a zip archive: the tensor's bytes lie in it uncompressed, in one place, so that rows can be
read without the rest. On the device `meta` torch.load reads only what describes the tensor, and says where its bytes
begin. To write, `torch.distributed.checkpoint.FileSystemWriter` is not used: it keeps every tensor of a file in memory.
"""

import argparse
import io
import json
import math
import os
import pickle
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view
from torch.utils import serialization

from megatron_l0moe.checkpoints.rules import Piece
from megatron_l0moe.checkpoints.safetensors_files import read_values
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs import digests
from megatron_l0moe.runs.stage_folder import write_text
from megatron_l0moe.runtime.checkpoint_metadata import read_metadata
from megatron_l0moe.runtime.json_files import read_json

# RuntimeError: what torch.load says of a damaged zip archive.
DAMAGED_PICKLE = (
    *(pickle.UnpicklingError, EOFError, AttributeError, ValueError, ImportError, LookupError, TypeError),
    *(RuntimeError, OverflowError),
)


@dataclass(frozen=True, kw_only=True)
class SavedTensor:
    """A tensor inside a file."""

    file: Path
    begin: int
    """The first byte of the archive in the file."""
    length: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    data_begin: int | None
    """Where the values lie in the file, in the order of the shape; None: in another order, as of a transposed view."""

    @classmethod
    def locate(cls, file: Path, begin: int, length: int) -> "SavedTensor":
        """Read what describes the tensor.

        Raises:
            DAMAGED_PICKLE: these bytes are no tensor.
        """
        tensor = _load(file, begin, length, device="meta")
        data_begin = None
        if tensor.is_contiguous():
            storage: Any = tensor.untyped_storage()
            data_begin = begin + storage._checkpoint_offset + tensor.storage_offset() * tensor.element_size()
            if data_begin + tensor.numel() * tensor.element_size() > begin + length:
                raise EOFError(f"{tensor.numel()} values in {length} bytes")
        shape = tuple(tensor.shape)
        return cls(
            file=file, begin=begin, length=length, shape=shape, dtype=tensor.dtype, data_begin=data_begin
        )

    def read(self, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Read rows (indices of dimension 0) `begin` up to and without `end`; by default all."""
        if self.data_begin is None:
            whole = _load(self.file, self.begin, self.length, device="cpu")
            return whole[begin:end] if self.shape else whole
        if not self.shape:
            return read_values(self.file, self.data_begin, (), self.dtype)
        shape = ((self.shape[0] if end is None else end) - begin, *self.shape[1:])
        skipped = begin * math.prod(shape[1:]) * self.dtype.itemsize
        return read_values(self.file, self.data_begin + skipped, shape, self.dtype)


def _load(file: Path, begin: int, length: int, *, device: str) -> torch.Tensor:
    with file.open("rb") as stream:
        view: Any = _create_file_view(stream, begin, length)
        tensor: torch.Tensor = torch.load(view, map_location=device, weights_only=True)
    return tensor


MEGATRON_FOLDER = "megatron"
"""The folder of the checkpoint in a stage that makes one without training."""
TRACKER_NAME = "latest_checkpointed_iteration.txt"
RELEASE = "release"
_MAX_TRACKER_BYTES = 100
SETTINGS_KEY = "l0moe"
# unique_key of Megatron's ShardedObject("common_state", ..., (1,), (0,))
COMMON_KEY = "common_state/shard_0_1"


class CheckpointReader:
    """Tensors and settings of the latest checkpoint in a folder that Megatron or `CheckpointWriter` wrote.

    Raises:
        L0MoEError: no such checkpoint, or files that are missing or truncated.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = _latest(folder)
        self._metadata = _read_metadata(self.path)
        self._saved: dict[MetadataIndex, SavedTensor] = {}
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(entry.size)
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        """Global shapes of all tensors, those of the optimizer too."""
        self.common: dict[str, Any] = self._read_common()
        """What is not a tensor: args, iteration, our settings under `l0moe`."""

    @property
    def settings(self) -> dict[str, Any]:
        """Our own settings: those stored under `l0moe`, over those among Megatron's arguments (`l0_...`)."""
        arguments = vars(self.common["args"]) if "args" in self.common else {}
        ours = {name: value for name, value in arguments.items() if name.startswith("l0_")}
        return {**ours, **self.common.get(SETTINGS_KEY, {})}

    def model_names(self) -> set[str]:
        """Names of the model's tensors (those of the optimizer begin with `optimizer.`)."""
        return {name for name in self.shapes if not name.startswith("optimizer.")}

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype without reading it."""
        dtype: torch.dtype = self._entry(name).properties.dtype
        return dtype

    def read(self, name: str, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Read rows (indices of dimension 0) `begin` up to and without `end` of a tensor; by default all of it.

        Of every stored chunk that overlaps only these rows are read.
        """
        entry = self._entry(name)
        rows = entry.size[0] if entry.size else 1
        end = rows if end is None else end
        assert 0 <= begin <= end <= rows, (name, begin, end)
        out: torch.Tensor | None = None
        values = 0
        for chunk in entry.chunks:
            first = chunk.offsets[0] if chunk.offsets else 0
            low, high = max(begin, first), min(end, first + (chunk.sizes[0] if chunk.sizes else 1))
            if low >= high:
                continue
            part = self._rows(name, chunk, low - first, high - first)
            if (low, high) == (begin, end) and chunk.sizes[1:] == entry.size[1:]:
                return part
            if out is None:
                out = torch.empty((end - begin, *entry.size[1:]), dtype=entry.properties.dtype)
            others = zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)
            out[(slice(low - begin, high - begin), *(slice(o, o + size) for o, size in others))] = part
            values += part.numel()
        if out is None:
            out = torch.empty((end - begin, *entry.size[1:]), dtype=entry.properties.dtype)
        if values < out.numel():
            raise L0MoEError(
                f"{self.path} holds {values} of {out.numel()} values of the tensor {name}; make the checkpoint again."
            )
        return out

    def _entry(self, name: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise L0MoEError(
                f"The checkpoint {self.path} has no tensor {name}; it was made by another model."
            )
        return entry

    def _rows(self, name: str, chunk: ChunkStorageMetadata, begin: int, end: int) -> torch.Tensor:
        """Read rows of one chunk, counted from its first."""
        index = MetadataIndex(name, chunk.offsets)
        info = self._metadata.storage_data.get(index)
        if info is None:
            raise L0MoEError(
                f"{self.path} does not say where the tensor {name} lies; make the checkpoint again."
            )
        file = self.path / info.relative_path
        saved = self._saved.get(index)
        try:
            if saved is None:
                saved = self._saved[index] = SavedTensor.locate(file, info.offset, info.length)
            if (saved.shape, saved.dtype) != (tuple(chunk.sizes), self.dtype(name)):
                raise ValueError(f"{saved.shape} of {saved.dtype}")
            return saved.read(begin, end)
        except DAMAGED_PICKLE as error:
            raise L0MoEError(
                f"{file} is damaged at the tensor {name}; make the checkpoint again or take an earlier one."
            ) from error

    def _read_common(self) -> dict[str, Any]:
        legacy = self.path / "common.pt"  # before Megatron-Core 0.19
        if legacy.is_file():
            return dict(_load_objects(io.BytesIO(legacy.read_bytes()), legacy))
        info = self._metadata.storage_data.get(MetadataIndex(COMMON_KEY))
        if info is None:
            raise L0MoEError(f"{self.path} has no {COMMON_KEY}; it was not written by Megatron-Core 0.19.")
        with (self.path / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            return dict(_load_objects(io.BytesIO(file.read(info.length)), self.path)[0])


def tracked(folder: Path) -> Path | None:
    """Return the checkpoint that the tracker file names, whether it exists or not; None where there is no such file."""
    tracker = folder / TRACKER_NAME
    if not tracker.is_file():
        return None
    text = tracker.read_bytes()[:_MAX_TRACKER_BYTES].decode(errors="replace").strip()
    if text == RELEASE:
        return folder / RELEASE
    if not (text.isascii() and text.isdigit()):
        raise L0MoEError(f"{tracker} must hold 'release' or an iteration number, got {text[:20]!r}.")
    return folder / f"iter_{int(text):07d}"


def _latest(folder: Path) -> Path:
    path = tracked(folder)  # before metadata.json of the folder itself, as Megatron's loader does
    if path is None and (folder / "metadata.json").is_file():
        return folder
    if path is None:
        raise L0MoEError(
            f"{folder} holds no Megatron checkpoint (no {TRACKER_NAME}); run the stage that makes it first."
        )
    if not (path / "metadata.json").is_file():
        raise L0MoEError(
            f"{folder / TRACKER_NAME} names the checkpoint {path.name}, but {path} is missing or incomplete."
        )
    return path


def _read_metadata(path: Path) -> Metadata:
    backend = read_json(path / "metadata.json", "make the checkpoint again", finite=False).get(
        "sharded_backend"
    )
    if backend != "torch_dist":
        raise L0MoEError(f"{path} has the format {backend!r}; save with Megatron's --ckpt-format torch_dist.")
    metadata = read_metadata(path)
    needed: dict[str, int] = {}
    for info in metadata.storage_data.values():
        end = info.offset + info.length
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), end)
    for name, size in needed.items():
        file = path / name
        if not file.is_file():
            raise L0MoEError(f"{file} is missing; make the checkpoint again.")
        if file.stat().st_size < size:
            raise L0MoEError(
                f"{file} is truncated ({file.stat().st_size} of {size} bytes); make the checkpoint again."
            )
    return metadata


def _load_objects(stream: io.BytesIO, source: Path) -> Any:
    """Unpickle plain values; Megatron's own list of allowed classes is imported only when needed."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(stream, weights_only=True)
    except DAMAGED_PICKLE:
        from megatron.core.safe_globals import SAFE_GLOBALS

        stream.seek(0)
        try:
            with torch.serialization.safe_globals([*SAFE_GLOBALS]):
                return torch.load(stream, weights_only=True)
        except DAMAGED_PICKLE as error:
            raise L0MoEError(f"The settings in {source} are damaged or of an unknown kind.") from error


CHECKPOINT_VERSION = 3.0  # megatron/training/checkpointing.py, generate_state_dict
# How Megatron is asked to name its tensors; it passes this back to `sharded_state_dict` when it loads.
CONTENT_METADATA = {
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
    "non_homogeneous_layers": True,
}
MAX_FILE_BYTES = 2**28
"""Large enough for any file system, small enough for the last file's sha256 to be known soon after it is written."""
_DCP_VERSION = "1.0.0"
_SETTINGS: Any = serialization.config  # of torch.save; made at run time, without types


class CheckpointWriter:
    """Write a `release` checkpoint: `with CheckpointWriter(folder, common) as writer: writer.write(...)`.

    Tensors lie in `folder/release`; the folder's tracker file is written last, so that a half-written
    checkpoint is never trusted. After an error nothing is left.
    """

    def __init__(self, folder: Path, common: dict[str, Any]) -> None:
        self.folder = folder
        self._common = common
        self._partial = folder / f".{RELEASE}.{os.getpid()}"
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._objects: dict[str, BytesStorageMetadata] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._file: BinaryIO | None = None
        self._files = 0

    def __enter__(self) -> "CheckpointWriter":
        if (self.folder / TRACKER_NAME).exists():
            raise L0MoEError(f"{self.folder} already holds a checkpoint; delete it or give another folder.")
        self._partial.mkdir(parents=True)
        return self

    def write(
        self,
        name: str,
        tensor: torch.Tensor,
        *,
        offset: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        """Write a whole tensor, or with `offset` and `shape` one chunk of a tensor of that global shape."""
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()  # torch.save writes the whole storage of a view
        start = torch.Size(offset if offset is not None else [0] * tensor.dim())
        size = torch.Size(shape if shape is not None else tensor.shape)
        entry = self._tensors.setdefault(
            name, TensorStorageMetadata(TensorProperties.create_from_tensor(tensor), size, [])
        )
        assert (entry.size, entry.properties.dtype) == (size, tensor.dtype), name
        index = MetadataIndex(name, start)
        assert index not in self._storage, f"{name} at {tuple(start)} was written twice"
        entry.chunks.append(ChunkStorageMetadata(start, tensor.shape))
        buffer = self._stream()
        begin = buffer.tell()
        # torch.load does not check the sums, and to compute them takes three times as long as all the rest.
        with _SETTINGS.patch("save.compute_crc32", False):
            torch.save(tensor, buffer)
        self._note(index, begin)

    def write_piece(self, piece: Piece) -> None:
        """Write some rows of a tensor, as one chunk."""
        offset = (piece.begin, *[0] * (piece.tensor.dim() - 1))
        self.write(piece.name, piece.tensor, offset=offset, shape=piece.shape)

    def write_empty_state(self, name: str, shards: int) -> None:
        """Write an empty object, in as many shards as Megatron asks for."""
        for shard in range(shards):
            self._write_object(f"{name}/shard_{shard}_{shards}", None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._write_object(COMMON_KEY, self._common)
            self._close()
            if kind is None:
                self._publish()
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _stream(self) -> BinaryIO:
        if self._file is not None and self._file.tell() >= MAX_FILE_BYTES:
            self._close()
        if self._file is None:
            self._file = (self._partial / f"__0_{self._files}.distcp").open("wb")
            self._files += 1
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            digests.written(Path(self._file.name))
            self._file = None

    def _note(self, index: MetadataIndex, begin: int) -> None:
        assert self._file is not None
        length = self._file.tell() - begin
        self._storage[index] = _StorageInfo(Path(self._file.name).name, begin, length)

    def _write_object(self, key: str, value: object) -> None:
        stream = self._stream()
        begin = stream.tell()
        torch.save([value], stream)
        self._objects[key] = BytesStorageMetadata()
        self._note(MetadataIndex(key), begin)

    def _publish(self) -> None:
        for name, entry in self._tensors.items():
            covered = sum(chunk.sizes.numel() for chunk in entry.chunks)
            assert covered == entry.size.numel(), f"{name}: {covered} of {entry.size.numel()} values written"
        metadata = Metadata(
            state_dict_metadata={**self._tensors, **self._objects},
            planner_data=None,
            storage_data=self._storage,
            storage_meta=StorageMeta(),
            version=_DCP_VERSION,
        )
        (self._partial / ".metadata").write_bytes(pickle.dumps(metadata))
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (self._partial / "metadata.json").write_text(json.dumps(config), encoding="utf-8")
        target = self.folder / RELEASE
        shutil.rmtree(target, ignore_errors=True)  # no tracker file: it was never finished
        os.replace(self._partial, target)
        write_text(self.folder / TRACKER_NAME, RELEASE)


def common_state(arguments: dict[str, Any], settings: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Return what Megatron needs beside the tensors of a `release` checkpoint.

    Args:
        arguments: model arguments by attribute name, for Megatron's `--use-checkpoint-args` and its checks.
        settings: stored under `l0moe`.
        vocab_size: rows of the embedding.
    """
    layout = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "padded_vocab_size": vocab_size,
        "ckpt_format": "torch_dist",
    }
    return {
        "args": argparse.Namespace(**arguments, **layout),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": 0,
        "content_metadata": dict(CONTENT_METADATA),
        SETTINGS_KEY: {"version": 1, **settings},
    }

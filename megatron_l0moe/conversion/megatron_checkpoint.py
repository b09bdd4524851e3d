"""Read Megatron torch_dist checkpoints by rows of a tensor, in one process without process groups.

The format is that of torch.distributed.checkpoint (DCP): `*.distcp` files hold chunks of tensors, each saved by
`torch.save`; the pickled `.metadata` says where every chunk of every tensor lies. Megatron adds metadata.json
(the format's name) and the object `common_state` (arguments, iteration, our own settings); its loader
(megatron/core/dist_checkpointing/serialization.py, `load`) reshards to any TP/PP/EP layout from the chunks.
`checkpoint_writer.py` writes them.
"""

import argparse
import io
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from megatron_l0moe.conversion.saved_tensors import DAMAGED_PICKLE, SavedTensor
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runtime.checkpoint_metadata import read_metadata
from megatron_l0moe.runtime.json_files import read_json

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
    """Return the checkpoint that the tracker file names, whether it exists or not; None where there is no such file.

    Raises:
        L0MoEError: it holds something else.
    """
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

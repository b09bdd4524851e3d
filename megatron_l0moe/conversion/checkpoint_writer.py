"""Write Megatron torch_dist checkpoints (`megatron_checkpoint.py`) piece by piece, in one process without groups.

`torch.distributed.checkpoint.FileSystemWriter` is not used: it keeps every tensor of a file in memory.
"""

import argparse
import json
import os
import pickle
import shutil
from collections.abc import Sequence
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
from torch.utils import serialization

from megatron_l0moe.conversion.mapping import Piece
from megatron_l0moe.conversion.megatron_checkpoint import COMMON_KEY, RELEASE, SETTINGS_KEY, TRACKER_NAME
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs import digests
from megatron_l0moe.runs.stage_folder import write_text

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

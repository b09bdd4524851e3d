"""Read the pickled `.metadata` of a torch_dist checkpoint without running what it may ask for.

torch/distributed/checkpoint/filesystem.py, FileSystemReader.read_metadata, is a bare `pickle.load`: a checkpoint from
elsewhere could run any command. Here only the classes that torch describes a checkpoint with are known. `install`
puts this reader into torch, so that Megatron's loader uses it as well.
"""

import pickle
from pathlib import Path, PurePosixPath
from typing import Any, override

import torch
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_l0moe.errors import L0MoEError

METADATA_NAME = ".metadata"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_DATA_CLASSES = (
    *(Metadata, MetadataIndex, StorageMeta, TensorProperties, TensorStorageMetadata),
    *(BytesStorageMetadata, ChunkStorageMetadata, torch_metadata._MEM_FORMAT_ENCODING),
    *(_StorageInfo, _StoragePrefix),
    # Megatron keeps the plans of all ranks too (dist_checkpointing/strategies/state_dict_saver.py).
    *(SavePlan, WriteItem, WriteItemType, TensorWriteData, BytesIOWriteData),
)


class _MegatronMetadata(Metadata):
    """The class of Megatron-Core before 0.16, which is empty by now."""


class _MegatronSavePlan(SavePlan):
    """The same."""


_KNOWN: dict[tuple[str, str], Any] = {
    **{(known.__module__, known.__name__): known for known in _DATA_CLASSES},
    (_MEGATRON, "MCoreMetadata"): _MegatronMetadata,
    (_MEGATRON, "MCoreSavePlan"): _MegatronSavePlan,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    # Of a checkpoint_id; only its text matters.
    **{(module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")},
}
# MemoryError: damaged bytes may ask for any length.
_DAMAGED = (
    *(pickle.UnpicklingError, EOFError, AttributeError, ValueError, ImportError, LookupError, TypeError),
    *(RuntimeError, OverflowError, MemoryError),
)


class _ForeignClassError(Exception):
    """The pickle names something that describes no checkpoint."""


class _MetadataUnpickler(pickle.Unpickler):
    """An unpickler that knows the classes of torch's checkpoint metadata, and nothing else."""

    @override
    def find_class(self, module_name: str, global_name: str) -> Any:
        known = _KNOWN.get((module_name, global_name))
        if known is None and module_name == "torch" and global_name.isidentifier():
            dtype = getattr(torch, global_name, None)
            known = dtype if isinstance(dtype, torch.dtype) else None
        if known is None:
            raise _ForeignClassError(f"{module_name}.{global_name}")
        return known


def read_metadata(path: Path, name: str = METADATA_NAME) -> Metadata:
    """Read the metadata of the checkpoint folder `path`.

    Raises:
        L0MoEError: it is missing or damaged, names another class than torch's own, or a file outside the folder.
    """
    file = path / name
    try:
        with file.open("rb") as stream:
            metadata = _checked(_MetadataUnpickler(stream).load(), file)
    except FileNotFoundError as error:
        raise L0MoEError(f"{path} has no {name} file; the checkpoint is incomplete.") from error
    except _ForeignClassError as error:
        raise L0MoEError(
            f"{file} asks for {error}, which describes no checkpoint and could run code, so it is not read; do not "
            "use this checkpoint, or get it from its maker again."
        ) from error
    except L0MoEError:
        raise
    except _DAMAGED as error:
        raise L0MoEError(f"{file} is truncated or damaged; make the checkpoint again.") from error
    return metadata


def install() -> None:
    """Let torch's own reader, and with it Megatron's, read metadata by `read_metadata`."""

    def restricted(self: Any, *args: Any, **kwargs: Any) -> Metadata:
        rank = kwargs.get("rank")
        name = METADATA_NAME if rank is None else f"__{rank}{METADATA_NAME}"
        metadata = read_metadata(Path(self.path), name)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    assert callable(FileSystemReader.read_metadata)
    FileSystemReader.read_metadata = restricted  # type: ignore[method-assign]


def _checked(metadata: Any, file: Path) -> Metadata:
    """Check kinds of values, which nothing after this looks at again, and that no path leaves the folder."""
    if not isinstance(metadata, Metadata):
        raise TypeError(type(metadata))
    tensors, places = metadata.state_dict_metadata, metadata.storage_data
    if not isinstance(tensors, dict) or not isinstance(places, dict):
        raise TypeError("no dictionaries")
    for name, entry in tensors.items():
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata | BytesStorageMetadata):
            raise TypeError(name)
        if isinstance(entry, TensorStorageMetadata):
            _check_tensor(entry)
    for index, info in places.items():
        if not isinstance(index, MetadataIndex) or not isinstance(info, _StorageInfo):
            raise TypeError(index)
        _check_sizes((info.offset, info.length))
        relative = info.relative_path
        if not isinstance(relative, str) or not relative or "\0" in relative:
            raise TypeError(relative)
        if PurePosixPath(relative).is_absolute() or ".." in PurePosixPath(relative).parts:
            raise L0MoEError(
                f"{file} says that tensors lie in {relative[:200]!r}, outside its folder; get the checkpoint again."
            )
    return metadata


def _check_tensor(entry: TensorStorageMetadata) -> None:
    if not isinstance(entry.properties.dtype, torch.dtype):
        raise TypeError(entry.properties.dtype)
    _check_sizes(entry.size)
    for chunk in entry.chunks:
        _check_sizes((*chunk.offsets, *chunk.sizes))
        ends = [begin + size for begin, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        if any(end > size for end, size in zip(ends, entry.size, strict=True)):
            raise ValueError("a chunk beyond its tensor")


def _check_sizes(values: Any) -> None:
    if not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise ValueError(values)

"""Read rows of a tensor that `torch.save` wrote somewhere inside a file, as in a torch_dist checkpoint.

What torch.save writes is a zip archive: the tensor's bytes lie in it uncompressed, in one place, so that rows can be
read without the rest. On the device `meta` torch.load reads only what describes the tensor, and says where its bytes
begin.
"""

import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_l0moe.conversion.safetensors_reader import read_values

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
    """Of the archive, bytes."""
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

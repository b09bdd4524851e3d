"""Embeddings on disk: the rows of several .npy files, read in pieces as if they were one array [N, V].

Shape letters: N = documents, V = embedding dimension.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_l0moe.errors import L0MoEError

Ids = npt.NDArray[np.int64]
FLOATS = (np.dtype(np.float16), np.dtype(np.float32))


class VectorShards:
    """Rows of .npy files [n_i, V], float16 or float32, one file after the other.

    A file is mapped only while rows are copied out of it: the pages of a map that stays open count as the memory of
    this process, and a scheduler may end it for that.
    """

    def __init__(self, files: Sequence[Path], rows: Ids | None = None) -> None:
        """Look at the files' headers.

        Args:
            files: at least one, in order.
            rows: int64 [N], the rows of all files together that this array has, in its order; None: all.

        Raises:
            L0MoEError: a file is missing, cut short, of another type, or its vectors are of another length.
        """
        self._files = [Path(file) for file in files]
        maps = [_open(file) for file in self._files]
        dimension, self._dtype = maps[0].shape[1], maps[0].dtype
        for file, array in zip(self._files, maps, strict=True):
            if (array.shape[1], array.dtype) != (dimension, self._dtype):
                raise L0MoEError(
                    f"Embeddings {file} are {array.dtype} [n, {array.shape[1]}], but {self._files[0]} is {self._dtype} "
                    f"[n, {dimension}]; remove the embeddings and start curate again."
                )
        self._ends = np.cumsum([len(array) for array in maps], dtype=np.int64)
        self._rows = rows
        self.shape = (int(self._ends[-1]) if rows is None else len(rows), int(dimension))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Ids) -> npt.NDArray[np.floating[Any]]:
        """Return a copy of some rows, in the order asked for; each file is read from its start to its end."""
        wanted = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows)
        if self._rows is not None:
            wanted = self._rows[wanted]
        found = np.empty((len(wanted), self.shape[1]), dtype=self._dtype)
        order = np.argsort(wanted, kind="stable")
        file_of = np.searchsorted(self._ends, wanted[order], side="right")
        for number in np.unique(file_of):
            here = order[file_of == number]
            first = int(self._ends[number - 1]) if number else 0
            found[here] = _open(self._files[number])[wanted[here] - first]
        return found


def _open(file: Path) -> npt.NDArray[np.floating[Any]]:
    """Map a file of vectors."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise L0MoEError(
            f"Embeddings {file} cannot be read ({' '.join(str(error).split())}); remove them and start curate again."
        ) from error
    if array.ndim != 2 or array.dtype not in FLOATS:
        raise L0MoEError(
            f"Embeddings {file} are {array.dtype} {list(array.shape)}, not float16 or float32 [n, dimension]; remove "
            "them and start curate again."
        )
    return np.asarray(array)

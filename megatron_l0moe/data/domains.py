"""The domain of every sample of an index, for ranks that see no batch: a sample's number alone decides it.

Shapes: M = micro-batches of a step on one rank, b = micro-batch.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.format import open_memmap

from megatron_l0moe.data.index import SAMPLE, index_files, load_header
from megatron_l0moe.errors import L0MoEError


class SampleDomains:
    """Reads the domains of an index' samples, 16 bytes a sample, from a mapped file."""

    def __init__(self, prefix: str | Path) -> None:
        """Open an index.

        Raises:
            L0MoEError: it is missing, damaged, or of another version.
        """
        self.num_domains = load_header(Path(prefix)).num_domains
        self._file = index_files(Path(prefix))[2]
        try:
            self._samples: Any = open_memmap(self._file, mode="r")
        except Exception as error:  # numpy parses an array's header as Python: damage raises nearly anything
            raise L0MoEError(f"{self._file} cannot be read ({error}); run the curate stage again.") from error
        assert self._samples.dtype == SAMPLE, "the data provider has checked it"

    def of_rank(
        self, consumed: int, *, num_micro_batches: int, micro_batch: int, rank: int, size: int
    ) -> npt.NDArray[np.int64]:
        """Return the domain of each sequence of a data-parallel rank's next step, int64 [M, b].

        In the order of Megatron's sampler for the dataloader type "single": micro-batch m of all ranks together is
        a run of `size * micro_batch` samples, of which each rank takes its own run of `micro_batch`.

        Args:
            consumed: samples before this step.
            num_micro_batches: M.
            micro_batch: b.
            rank: of this process in its data-parallel group.
            size: of that group.

        Raises:
            L0MoEError: a sample of a domain that the index does not have.
        """
        end = consumed + num_micro_batches * size * micro_batch
        clusters = np.asarray(self._samples[consumed:end]["cluster"], dtype=np.int64)
        if clusters.max() >= self.num_domains:  # on a GPU it would end as an error of some kernel
            raise L0MoEError(
                f"{self._file} holds a sample of domain {clusters.max()}, and its header has {self.num_domains} "
                "domains; run the curate stage again."
            )
        return clusters.reshape(num_micro_batches, size, micro_batch)[:, rank]

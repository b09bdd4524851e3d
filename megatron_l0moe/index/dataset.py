"""The dataset that serves a sample index to Megatron's own sampler (dataloader type "single").

The attention of a sample runs over the documents that are packed in it, as in Megatron's GPTDataset without
`reset_attention_mask`. A sample's number alone decides its domain, so ranks that see no batch know the domains too.

Shapes: S = sequence length, M = micro-batches of a step on one rank, b = micro-batch.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from numpy.lib.format import open_memmap

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.index.index import DOC, SAMPLE, IndexHeader, index_files, load_header
from megatron_l0moe.index.verify import (
    check_batches,
    check_checksums,
    check_records,
    check_sizes,
    checksums_of,
)


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


class CurriculumDataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Item i is global sample i of an index; memory-mapped, and picklable for DataLoader workers."""

    def __init__(
        self,
        prefix: str | Path,
        *,
        vocab_size: int | None = None,
        seq_length: int | None = None,
        verify: bool = True,
    ) -> None:
        """Open an index.

        Args:
            prefix: path of the index without `.ccm.json`.
            vocab_size: vocabulary of the model that will be trained, unpadded or padded.
            seq_length: sequence length of the training job.
            verify: compare the sha256 of every file. Sizes are always compared. Reading 60 GB takes minutes: with
                a large corpus, let one rank verify.

        Raises:
            L0MoEError: a file is missing or not the one that the header names, the index is of another version,
                its ids do not fit the vocabulary, or its sequences have another length.
        """
        self.prefix = Path(prefix)
        self.header: IndexHeader = load_header(self.prefix)
        self._check_model(vocab_size, seq_length)
        check_sizes(self.prefix, self.header)
        if verify:
            check_checksums(self.prefix, checksums_of(self.prefix, self.header))
        try:
            self._open()
        except Exception as error:  # numpy parses an array's header as Python: damage raises nearly anything
            raise L0MoEError(
                f"A file of sample index {self.prefix} is damaged ({' '.join(str(error).split())}); copy the curate "
                "folder again or run curate again."
            ) from error
        self._check_contents()

    def __len__(self) -> int:
        return self.header.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return tokens int64 [S], labels int64 [S], loss_mask fp32 [S], position_ids int64 [S], domain int64 []."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        tokens = torch.from_numpy(self._read(index))
        length = self.header.seq_length
        return {
            "tokens": tokens[:-1].contiguous(),
            "labels": tokens[1:].contiguous(),
            "loss_mask": torch.ones(length, dtype=torch.float32),
            "position_ids": torch.arange(length, dtype=torch.int64),
            "domain": torch.tensor(int(self._samples[index]["cluster"]), dtype=torch.int64),
        }

    def check_all(self) -> None:
        """Check every record's range and every global batch; checksums are checked on opening."""
        lengths = [shard.sequence_lengths for shard in self._shards]
        check_records(self.prefix, self.header, self._docs, self._samples, lengths)
        check_batches(self.prefix, self.header, self._samples)

    def __getstate__(self) -> dict[str, Any]:
        return {"prefix": self.prefix, "header": self.header}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _read(self, index: int) -> npt.NDArray[np.int64]:
        """Return the S + 1 tokens of a sample.

        Raises:
            L0MoEError: its record points outside the files, which only an index that was not verified can hold.
        """
        record = self._samples[index]
        position, offset = int(record["doc_pos"]), int(record["offset"])
        missing = self.header.seq_length + 1
        parts = []
        try:
            while missing:
                place = self._docs[position]
                shard, document = self._shards[place["shard"]], int(place["doc"])
                length = min(int(shard.sequence_lengths[document]) - offset, missing)
                if position < 0 or length <= 0:
                    raise IndexError("a start outside its document")
                parts.append(shard.get(document, offset=offset, length=length))
                missing -= length
                position, offset = position + 1, 0
        except (IndexError, ValueError, OverflowError) as error:
            raise L0MoEError(
                f"Record {index} of sample index {self.prefix} points outside its files ({error}); copy the curate "
                "folder again or run curate again."
            ) from error
        return np.concatenate(parts, dtype=np.int64)

    def _open(self) -> None:
        _, docs_file, samples_file = index_files(self.prefix)
        # Plain arrays over the mapped files: numpy's memmap class makes each access slower.
        self._docs = np.asarray(open_memmap(docs_file, mode="r"))
        self._samples = np.asarray(open_memmap(samples_file, mode="r"))
        self._shards = [IndexedDataset(str(self.prefix.parent / shard.path)) for shard in self.header.shards]

    def _check_model(self, vocab_size: int | None, seq_length: int | None) -> None:
        header = self.header
        if vocab_size is not None and header.vocab_size > vocab_size:
            raise L0MoEError(
                f"Sample index {self.prefix} holds ids below {header.vocab_size}, but the model's vocabulary has "
                f"{vocab_size}; run curate with the tokenizer of this model."
            )
        if seq_length is not None and header.seq_length != seq_length:
            raise L0MoEError(
                f"Sample index {self.prefix} holds sequences of {header.seq_length} tokens, but the job asks for "
                f"{seq_length}; set its sequence length to {header.seq_length}, or run curate again."
            )

    def _check_contents(self) -> None:
        """Compare the arrays with the header, without reading through them."""
        header = self.header
        samples_fit = self._samples.dtype == SAMPLE and self._samples.shape == (header.samples,)
        docs_fit = self._docs.dtype == DOC and self._docs.ndim == 1
        for fits, what in ((samples_fit, "samples"), (docs_fit, "documents")):
            if not fits:
                raise L0MoEError(
                    f"Sample index {self.prefix}: the size or type of {what} differs from the header; copy the curate "
                    "folder again or run curate again."
                )

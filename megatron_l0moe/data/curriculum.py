"""The dataset that serves a sample index to Megatron's own sampler (dataloader type "single").

S = sequence length. The attention of a sample runs over the documents that are packed in it, as in Megatron's
GPTDataset without `reset_attention_mask`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from megatron_l0moe.data.index import DOC, SAMPLE, IndexHeader, index_files, load_header
from megatron_l0moe.data.manifest import sha256_file
from megatron_l0moe.errors import L0MoEError


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
        self._check_files(verify)
        try:
            self._open()
        except (
            ValueError,
            AssertionError,
            OSError,
        ) as error:  # numpy's and Megatron's words for damaged files
            raise L0MoEError(
                f"A file of sample index {self.prefix} is damaged ({error}); copy the curate folder again or run "
                "curate again."
            ) from error
        self._check_contents()

    def __len__(self) -> int:
        return self.header.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return tokens int64 [S], labels int64 [S], loss_mask fp32 [S], position_ids int64 [S], domain int64 []."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        record = self._samples[index]
        tokens = torch.from_numpy(self._read(int(record["doc_pos"]), int(record["offset"])))
        length = self.header.seq_length
        return {
            "tokens": tokens[:-1].contiguous(),
            "labels": tokens[1:].contiguous(),
            "loss_mask": torch.ones(length, dtype=torch.float32),
            "position_ids": torch.arange(length, dtype=torch.int64),
            "domain": torch.tensor(int(record["cluster"]), dtype=torch.int64),
        }

    def __getstate__(self) -> dict[str, Any]:
        return {"prefix": self.prefix, "header": self.header}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _read(self, position: int, offset: int) -> npt.NDArray[np.int64]:
        """Return S + 1 tokens from ``offset`` of the document at ``position`` on."""
        missing = self.header.seq_length + 1
        parts = []
        while missing:
            shard, document = (int(number) for number in self._docs[position])
            length = min(int(self._shards[shard].sequence_lengths[document]) - offset, missing)
            parts.append(self._shards[shard].get(document, offset=offset, length=length))
            missing -= length
            position, offset = position + 1, 0
        return np.concatenate(parts, dtype=np.int64)

    def _open(self) -> None:
        _, docs_file, samples_file = index_files(self.prefix)
        self._docs = np.load(docs_file, mmap_mode="r")
        self._samples = np.load(samples_file, mmap_mode="r")
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

    def _check_files(self, verify: bool) -> None:
        _, docs_file, samples_file = index_files(self.prefix)
        expected = {docs_file: self.header.docs_sha256, samples_file: self.header.samples_sha256}
        for shard in self.header.shards:
            for suffix, checksum in ((".bin", shard.bin_sha256), (".idx", shard.idx_sha256)):
                expected[self.prefix.parent / f"{shard.path}{suffix}"] = checksum
        for path, checksum in expected.items():
            if not path.is_file():
                raise L0MoEError(
                    f"Sample index {self.prefix} needs {path}, which does not exist; run curate again."
                )
            if verify and sha256_file(path) != checksum:
                raise L0MoEError(
                    f"{path} is not the file that sample index {self.prefix} was made with (sha256 differs); copy the "
                    "curate folder again or run curate again."
                )

    def _check_contents(self) -> None:
        """Compare sizes and types with the header."""
        header = self.header
        found = [(self._samples.dtype == SAMPLE, "samples"), (self._docs.dtype == DOC, "documents")]
        found.append((len(self._samples) == header.samples, "samples"))
        for dataset, shard in zip(self._shards, header.shards, strict=True):
            tokens = int(dataset.sequence_lengths.sum(dtype=np.int64))
            size = (self.prefix.parent / f"{shard.path}.bin").stat().st_size
            whole = (
                size
                == tokens * DType.size(dataset.index.dtype)
                == shard.tokens * DType.size(dataset.index.dtype)
            )
            found.append((whole and len(dataset) == shard.documents, shard.path))
        for fits, what in found:
            if not fits:
                raise L0MoEError(
                    f"Sample index {self.prefix}: the size or type of {what} differs from the header; copy the curate "
                    "folder again or run curate again."
                )

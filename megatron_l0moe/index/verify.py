"""Checks of a sample index against its files: checksums, the range of every record, the composition of every batch.

Shape letters: N = documents, M = samples, K = domains, p = sequences of each domain in a global batch, S = sequence
length. Memory: 8 bytes for each document; records are taken in blocks.
"""

import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.indexed_dataset import DType

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.index.index import IndexHeader, Records, Shard, index_files
from megatron_l0moe.runs.digests import MAX_READERS
from megatron_l0moe.runs.stage_folder import sha256_file

BLOCK_RECORDS = 1 << 20
IDX_HEADER = struct.Struct("<9sQBQQ")
IDX_MAGIC = b"MMIDIDX\x00\x00"

Ints = npt.NDArray[np.int64]


def checksums_of(prefix: Path, header: IndexHeader) -> dict[Path, str]:
    """Return the files that an index is made of, its header left out, with the sha256 that the header names."""
    _, docs_file, samples_file = index_files(prefix)
    expected = {docs_file: header.docs_sha256, samples_file: header.samples_sha256}
    for shard in header.shards:
        expected[prefix.parent / f"{shard.path}.bin"] = shard.bin_sha256
        expected[prefix.parent / f"{shard.path}.idx"] = shard.idx_sha256
    return expected


def check_sizes(prefix: Path, header: IndexHeader) -> None:
    """Refuse an index without one of its files, or whose shards have other sizes; reads a few bytes of each.

    Raises:
        L0MoEError: a file is missing, cut short, or of another corpus.
    """
    for path in checksums_of(prefix, header):
        if not path.is_file():
            raise L0MoEError(f"Sample index {prefix} needs {path}, which does not exist; run curate again.")
    for shard in header.shards:
        path = prefix.parent / f"{shard.path}.bin"
        if _bytes_of_tokens(path.with_suffix(".idx"), shard) != path.stat().st_size:
            raise L0MoEError(
                f"Sample index {prefix}: the size or type of {shard.path} differs from the header; copy the curate "
                "folder again or run curate again."
            )


def _bytes_of_tokens(idx: Path, shard: Shard) -> int | None:
    """Return the bytes that the .bin of an .idx must have, None if the .idx is not that of ``shard``.

    The layout is Megatron's (core/datasets/indexed_dataset.py): header, then int32 lengths, int64 pointers, and int64
    document ends. Its reader leaves an error message of its own behind when it meets a short file.
    """
    count = shard.documents
    with idx.open("rb") as file:
        start = file.read(IDX_HEADER.size)
        if len(start) < IDX_HEADER.size:
            return None
        magic, version, code, sequences, documents = IDX_HEADER.unpack(start)
        expected = IDX_HEADER.size + 12 * count + 8 * (count + 1)
        sizes = (sequences, documents, idx.stat().st_size)
        if (magic, version) != (IDX_MAGIC, 1) or sizes != (count, count + 1, expected):
            return None
        if code not in [kind.value for kind in DType]:
            return None
        item = int(DType.size(code))
        if not count:  # curate writes no such shard, and Megatron's reader cannot open one
            return None
        file.seek(IDX_HEADER.size + 4 * (count - 1))
        last_length = int.from_bytes(file.read(4), "little", signed=True)
        file.seek(IDX_HEADER.size + 4 * count + 8 * (count - 1))
        end = int.from_bytes(file.read(8), "little", signed=True) + last_length * item
    return end if end == shard.tokens * item else None


def check_checksums(prefix: Path, expected: Mapping[Path, str]) -> None:
    """Compare the sha256 of files, several at a time.

    Args:
        prefix: of the index that names them, for the message.
        expected: sha256 by file.
    """
    with ThreadPoolExecutor(min(MAX_READERS, os.cpu_count() or 1)) as pool:
        for path, found in zip(expected, pool.map(sha256_file, expected), strict=True):
            if found != expected[path]:
                pool.shutdown(cancel_futures=True)
                raise L0MoEError(
                    f"{path} is not the file that sample index {prefix} was made with (sha256 differs); copy the "
                    "curate folder again or run curate again."
                )


def check_records(
    prefix: Path, header: IndexHeader, docs: Records, samples: Records, lengths: list[npt.NDArray[np.int32]]
) -> None:
    """Check that every sample lies within the documents of its own domain, and follows the one before it.

    Args:
        prefix: of the index, for the messages.
        header: its header.
        docs: [N] of ``DOC``.
        samples: [M] of ``SAMPLE``.
        lengths: tokens of each document, for each shard.

    Raises:
        L0MoEError: a document or a record points outside, or a domain's samples leave a gap or overlap.
    """
    sizes = _document_lengths(prefix, docs, lengths)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    groups = len(header.order) * header.num_domains
    first, last = np.full(groups, -1, dtype=np.int64), np.full(groups, -1, dtype=np.int64)
    for begin, block in _blocks(samples, BLOCK_RECORDS):
        group = _group_of(prefix, header, begin, block)
        position, offset = block["doc_pos"].astype(np.int64), block["offset"].astype(np.int64)
        _refuse(prefix, begin, (position < 0) | (position >= len(docs)), "names a document that is not there")
        _refuse(prefix, begin, offset >= sizes[position], "starts behind the end of its document")
        place = starts[position] + offset
        _refuse(prefix, begin, place + header.seq_length >= starts[-1], "goes beyond the last document")
        _check_steps(prefix, begin, group, place, first, last, header.seq_length)
    _check_groups_apart(prefix, header, first, last)


def check_batches(prefix: Path, header: IndexHeader, samples: Records) -> None:
    """Check that every global batch holds exactly p sequences of each domain and never spans two sets.

    Of random batches only the sets are balanced. An expert's index holds one domain only.

    Raises:
        L0MoEError: a batch does not; the message names the first.
    """
    if header.kind == "expert":
        clusters = samples["cluster"]
        if len(samples) % header.sequences_per_domain or len(samples) == 0 or (clusters != clusters[0]).any():
            raise L0MoEError(
                f"Sample index {prefix} is an expert's, but it does not hold whole batches of one domain; run curate "
                "again."
            )
        return
    k, p, batch = header.num_domains, header.sequences_per_domain, header.global_batch_size
    whole = np.repeat(np.arange(k), p)
    if len(samples) % batch or any(start % batch for start in header.iteration_start_samples):
        raise L0MoEError(
            f"Sample index {prefix} does not hold whole global batches of p * K = {p} * {k} samples in every set; run "
            "curate again."
        )
    if header.batches == "random":
        _check_balanced_sets(prefix, header, samples)
        return
    for begin, block in _blocks(samples, max(BLOCK_RECORDS // batch, 1) * batch):
        table = np.sort(block["cluster"].reshape(-1, batch), axis=1)
        wrong = np.flatnonzero((table != whole).any(axis=1))
        if len(wrong):
            raise L0MoEError(
                f"Global batch {begin // batch + int(wrong[0])} of sample index {prefix} does not hold exactly {p} "
                f"sequence(s) of each of its {k} domains; copy the curate folder again or run curate again."
            )


def _check_balanced_sets(prefix: Path, header: IndexHeader, samples: Records) -> None:
    """Check that every set holds as many sequences of one domain as of any other."""
    ends = [*header.iteration_start_samples[1:], header.samples]
    for number, start, end in zip(header.order, header.iteration_start_samples, ends, strict=True):
        counts = np.zeros(header.num_domains, dtype=np.int64)
        for _, block in _blocks(samples[start:end], BLOCK_RECORDS):
            counts += np.bincount(block["cluster"], minlength=header.num_domains)[: header.num_domains]
        if (counts * header.num_domains != end - start).any():
            raise L0MoEError(
                f"Set {number} of sample index {prefix} holds {counts.min()} to {counts.max()} sequences of a domain, "
                "not the same number of each; copy the curate folder again or run curate again."
            )


def _document_lengths(prefix: Path, docs: Records, lengths: list[npt.NDArray[np.int32]]) -> Ints:
    """Return the tokens of every listed document, int64 [N]."""
    sizes = np.zeros(len(docs), dtype=np.int64)
    wrong = docs["shard"] >= len(lengths)
    for number, shard_lengths in enumerate(lengths):
        mine = np.flatnonzero(docs["shard"] == number)
        inside = docs["doc"][mine] < len(shard_lengths)
        wrong[mine[~inside]] = True
        sizes[mine[inside]] = shard_lengths[docs["doc"][mine[inside]]]
    if len(np.unique(np.ascontiguousarray(docs).view(np.uint64))) != len(docs):
        raise L0MoEError(
            f"Sample index {prefix} lists a document twice, and documents are never repeated; copy the curate folder "
            "again or run curate again."
        )
    if wrong.any():
        raise L0MoEError(
            f"Document {int(np.argmax(wrong))} of sample index {prefix} names a shard or a document that is not there; "
            "copy the curate folder again or run curate again."
        )
    return sizes


def _group_of(prefix: Path, header: IndexHeader, begin: int, block: Records) -> Ints:
    """Return for each record the number of its (set, domain): place of the set * K + domain."""
    numbers = np.arange(begin, begin + len(block))
    place = np.searchsorted(header.iteration_start_samples, numbers, side="right") - 1
    expected = np.array(header.order, dtype=np.int64)[place]
    _refuse(prefix, begin, block["iter"] != expected, "belongs to another set than its place in the order")
    _refuse(prefix, begin, block["cluster"] >= header.num_domains, "names a domain that is not there")
    return place * header.num_domains + block["cluster"].astype(np.int64)


def _check_steps(
    prefix: Path, begin: int, group: Ints, place: Ints, first: Ints, last: Ints, seq_length: int
) -> None:
    """Check that samples of a group start S tokens after each other; updates the groups' first and last places."""
    order = np.argsort(group, kind="stable")
    group_sorted, place_sorted = group[order], place[order]
    new = np.concatenate([[True], group_sorted[1:] != group_sorted[:-1]])
    before = np.concatenate([[-1], place_sorted[:-1]])
    before[new] = last[group_sorted[new]]
    wrong = np.zeros(len(group), dtype=bool)
    wrong[order] = (before >= 0) & (place_sorted - before != seq_length)
    _refuse(prefix, begin, wrong, "does not follow the sample of its domain before it")
    fresh = new & (before < 0)
    first[group_sorted[fresh]] = place_sorted[fresh]
    ends = np.concatenate([new[1:], [True]])
    last[group_sorted[ends]] = place_sorted[ends]


def _check_groups_apart(prefix: Path, header: IndexHeader, first: Ints, last: Ints) -> None:
    """Check that no (set, domain) reads tokens of the next one; both start with a document of their own."""
    used = np.flatnonzero(first >= 0)
    by_place = used[np.argsort(first[used])]
    over = last[by_place[:-1]] + header.seq_length >= first[by_place[1:]]
    if over.any():
        number = int(by_place[int(np.argmax(over))])
        place, cluster = divmod(number, header.num_domains)
        raise L0MoEError(
            f"Domain {cluster} of set {header.order[place]} in sample index {prefix} reads documents of another domain "
            "or set; copy the curate folder again or run curate again."
        )


def _blocks(samples: Records, size: int) -> Iterator[tuple[int, Records]]:
    for begin in range(0, len(samples), size):
        yield begin, samples[begin : begin + size]


def _refuse(prefix: Path, begin: int, wrong: Any, problem: str) -> None:
    if np.any(wrong):
        raise L0MoEError(
            f"Record {begin + int(np.argmax(wrong))} of sample index {prefix} {problem}; copy the curate folder again "
            "or run curate again."
        )

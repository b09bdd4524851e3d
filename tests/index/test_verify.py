"""Every violation of an index that checksums would not show, made by hand, and found."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.index import verify
from megatron_l0moe.index.dataset import CurriculumDataset
from megatron_l0moe.index.index import index_files


def changed(prefix: Path, change: Callable[[Any, Any], None], **header: Any) -> CurriculumDataset:
    """Open an index whose records (and documents) were changed."""
    _, docs_file, samples_file = index_files(prefix)
    docs, samples = np.load(docs_file), np.load(samples_file)
    change(samples, docs)
    np.save(docs_file, docs)
    np.save(samples_file, samples)
    dataset = CurriculumDataset(prefix, verify=False)
    dataset.header = dataclasses.replace(dataset.header, **header)
    return dataset


def swap(samples: Any, i: int, j: int) -> None:
    samples[[i, j]] = samples[[j, i]]


@pytest.mark.parametrize("block", [1 << 20, 7, 1], ids=lambda block: f"blocks of {block}")
def test_a_good_index_passes(toy_index, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(verify, "BLOCK_RECORDS", block)
    CurriculumDataset(toy_index(rounds={2: 4, 1: 6})[0]).check_all()


def set_field(field: str, value: int) -> Callable[[Any, Any], None]:
    def change(samples: Any, docs: Any) -> None:
        samples[13][field] = value

    return change


def move_back(samples: Any, docs: Any) -> None:
    mine = np.flatnonzero((samples["cluster"] == 1) & (samples["iter"] == 2))
    samples[mine[3]] = samples[mine[2]]


def bad_document(samples: Any, docs: Any) -> None:
    docs[5]["doc"] = 10**6


def bad_shard(samples: Any, docs: Any) -> None:
    docs[5]["shard"] = 4


def twice(samples: Any, docs: Any) -> None:
    docs[5] = docs[6]


def two_domains(samples: Any, docs: Any) -> None:
    """Domain 0 of set 2 starts one sample later everywhere, so its last sample ends in the documents of domain 1."""
    mine = np.flatnonzero((samples["cluster"] == 0) & (samples["iter"] == 2))
    samples[mine[:-1]] = samples[mine[1:]]
    following = samples[np.flatnonzero((samples["cluster"] == 1) & (samples["iter"] == 2))[0]]
    last = samples[mine[-1]]
    last["doc_pos"], last["offset"] = following["doc_pos"], following["offset"]


@pytest.mark.parametrize("block", [1 << 20, 5], ids=lambda block: f"blocks of {block}")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_field("doc_pos", 10**6), "Record 13 of .* names a document that is not there"),
        (set_field("doc_pos", -1), "Record 13 of .* names a document that is not there"),
        (set_field("offset", 10**6), "Record 13 of .* starts behind the end of its document"),
        (set_field("cluster", 7), "Record 13 of .* names a domain that is not there"),
        (set_field("iter", 1), "Record 13 of .* belongs to another set than its place"),
        (move_back, "does not follow the sample of its domain before it"),
        (bad_document, "Document 5 of .* names a shard or a document that is not there"),
        (bad_shard, "Document 5 of .* names a shard or a document that is not there"),
        (twice, "lists a document twice"),
        (two_domains, "does not follow the sample of its domain|reads documents of another domain"),
    ],
    ids=[
        "position",
        "negative",
        "offset",
        "domain",
        "set",
        "repeated",
        "document",
        "shard",
        "twice",
        "two domains",
    ],
)
def test_records(toy_index, monkeypatch: pytest.MonkeyPatch, block: int, change: Any, message: str) -> None:
    monkeypatch.setattr(verify, "BLOCK_RECORDS", block)
    with pytest.raises(L0MoEError, match=message):
        changed(toy_index()[0], change).check_all()


def test_a_domain_that_reads_on(toy_index) -> None:
    """Longer sequences than were packed: the last sample of each domain would end in the next one's documents."""
    dataset = CurriculumDataset(toy_index()[0])
    lengths = [shard.sequence_lengths for shard in dataset._shards]
    longer = dataclasses.replace(dataset.header, seq_length=100)
    samples = dataset._samples[:4].copy()
    samples["iter"] = 2
    one = dataclasses.replace(longer, samples=4)
    with pytest.raises(L0MoEError, match=r"Domain \d of set 2 .* reads documents of another domain"):
        verify.check_records(dataset.prefix, one, dataset._docs, samples, lengths)


@pytest.mark.parametrize("block", [1 << 20, 1], ids=lambda block: f"blocks of {block}")
def test_batches(toy_index, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(verify, "BLOCK_RECORDS", block)
    prefix, _ = toy_index()
    dataset = CurriculumDataset(prefix)
    whole = dataset._samples.copy()
    swap(whole, 13, 14)  # within batch 1
    verify.check_batches(prefix, dataset.header, whole)
    swap(whole, 8, 16)
    assert whole["cluster"][8] != whole["cluster"][16]
    with pytest.raises(
        L0MoEError, match=r"Global batch 1 of .* does not hold exactly 2 sequence\(s\) of each"
    ):
        verify.check_batches(prefix, dataset.header, whole)
    with pytest.raises(L0MoEError, match=r"whole global batches of p \* K = 2 \* 4 samples"):
        verify.check_batches(prefix, dataset.header, dataset._samples[:-1])
    shifted = dataclasses.replace(dataset.header, iteration_start_samples=[0, 20])
    with pytest.raises(L0MoEError, match="whole global batches"):
        verify.check_batches(prefix, shifted, dataset._samples)


@pytest.mark.parametrize("block", [1 << 20, 5], ids=lambda block: f"blocks of {block}")
def test_random_batches(toy_index, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """No batch has to hold every domain, but every set does, as often as any other; all else is checked as always."""
    monkeypatch.setattr(verify, "BLOCK_RECORDS", block)
    prefix, _ = toy_index(rotate=False, shuffle_seed=3)
    dataset = CurriculumDataset(prefix)
    dataset.check_all()
    balanced = dataclasses.replace(dataset.header, batches="balanced")
    with pytest.raises(L0MoEError, match="does not hold exactly 2"):
        verify.check_batches(prefix, balanced, dataset._samples)
    other = dataset._samples.copy()
    other[30]["cluster"] = (other[30]["cluster"] + 1) % 4
    with pytest.raises(L0MoEError, match=r"Set 1 of sample index .* holds 5 to 7 sequences of a domain"):
        verify.check_batches(prefix, dataset.header, other)
    with pytest.raises(L0MoEError, match="whole global batches"):
        verify.check_batches(prefix, dataset.header, dataset._samples[:-1])
    with pytest.raises(L0MoEError, match=r"Record 13 of .* starts behind the end of its document"):
        changed(prefix, set_field("offset", 10**6)).check_all()


def test_experts(toy_index) -> None:
    prefix, _ = toy_index(clusters=1, order=(1,), kind="expert", rounds=12, name="expert_000")
    dataset = CurriculumDataset(prefix)
    dataset.check_all()
    other = dataset._samples.copy()
    other[5]["cluster"] = 1
    for samples in (other, dataset._samples[:-1], dataset._samples[:0]):
        with pytest.raises(L0MoEError, match="whole batches of one domain"):
            verify.check_batches(prefix, dataset.header, samples)


@pytest.mark.parametrize("at", [0, 12, 17, 20, 28], ids=lambda at: f"byte {at}")
def test_an_idx_of_another_kind(toy_index, at: int) -> None:
    prefix, _ = toy_index()
    path = prefix.parent / "iter_001" / "shard_00000.idx"
    content = bytearray(path.read_bytes())
    content[at] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(L0MoEError, match=r"size or type of iter_001/shard_00000 differs from the header"):
        CurriculumDataset(prefix, verify=False)


def test_a_bin_of_another_corpus(toy_index) -> None:
    """With other sizes it is seen at once, with the same sizes by its checksum."""
    prefix, _ = toy_index()
    here, there = (prefix.parent / "iter_001" / f"shard_0000{n}.bin" for n in range(2))
    good = here.read_bytes()
    here.write_bytes(there.read_bytes())
    with pytest.raises(L0MoEError, match="size or type of iter_001/shard_00000"):
        CurriculumDataset(prefix, verify=False)
    here.write_bytes(good[::-1])
    CurriculumDataset(prefix, verify=False)
    with pytest.raises(L0MoEError, match=r"shard_00000\.bin is not the file .* \(sha256 differs\)"):
        CurriculumDataset(prefix)

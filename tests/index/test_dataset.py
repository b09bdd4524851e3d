"""The dataset against a naive reading of the same stream, and everything that it must refuse.

The domains of a rank's samples against what Megatron's sampler hands to that rank.
"""

import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from torch.utils.data import DataLoader

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.index.dataset import CurriculumDataset, SampleDomains
from megatron_l0moe.index.index import index_files
from megatron_l0moe.runs.stage_folder import CHECKSUM, sealed

S = 8


def naive(streams: dict[tuple[int, int], list[int]], i: int) -> tuple[list[int], int]:
    """Sample i of toy_index' default: order 2, 1; 6 rounds of 4 clusters each; rotated by one a round."""
    iteration = (2, 1)[i // 24]
    round_, place = i % 24 // 4, i % 4
    cluster = (place + i // 4) % 4
    return streams[iteration, cluster][round_ * S : round_ * S + S + 1], cluster


def test_items_equal_a_naive_reference(toy_index) -> None:
    prefix, streams = toy_index()
    dataset = CurriculumDataset(prefix, vocab_size=5000, seq_length=S)
    assert len(dataset) == 48
    for i in range(48):
        item = dataset[i]
        tokens, cluster = naive(streams, i)
        assert item["tokens"].tolist() == tokens[:-1]
        assert item["labels"].tolist() == tokens[1:]
        assert int(item["domain"]) == cluster
    assert naive(streams, 5) != naive(streams, 6)  # control: the reference tells samples apart


def test_shapes_and_types(toy_index) -> None:
    item = CurriculumDataset(str(toy_index()[0]))[0]
    assert {key: (value.dtype, tuple(value.shape)) for key, value in item.items()} == {
        "tokens": (torch.int64, (S,)),
        "labels": (torch.int64, (S,)),
        "loss_mask": (torch.float32, (S,)),
        "position_ids": (torch.int64, (S,)),
        "domain": (torch.int64, ()),
    }
    assert item["position_ids"].tolist() == list(range(S))
    assert item["loss_mask"].tolist() == [1.0] * S


def test_out_of_range(toy_index) -> None:
    dataset = CurriculumDataset(toy_index()[0])
    for i in (48, -1):
        with pytest.raises(IndexError, match=f"sample {i} of 48"):
            dataset[i]


def test_pickle_and_workers(toy_index) -> None:
    dataset = CurriculumDataset(toy_index()[0])
    copy = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(copy[7][key], dataset[7][key]) for key in dataset[7])
    batches = list(DataLoader(dataset, batch_size=8, num_workers=1))
    assert torch.equal(batches[1]["tokens"], torch.stack([dataset[i]["tokens"] for i in range(8, 16)]))


def test_model_that_does_not_fit(toy_index) -> None:
    prefix, _ = toy_index()
    CurriculumDataset(prefix, vocab_size=5120)  # padded vocabularies are larger
    with pytest.raises(L0MoEError, match="ids below 5000, but the model's vocabulary has 4999"):
        CurriculumDataset(prefix, vocab_size=4999)
    with pytest.raises(
        L0MoEError, match="sequences of 8 tokens, but the job asks for 16; set its sequence length to 8"
    ):
        CurriculumDataset(prefix, seq_length=16)


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    ["moe.ccm.docs.npy", "moe.ccm.samples.npy", "iter_001/shard_00001.bin", "iter_002/shard_00000.idx"],
)
def test_changed_truncated_and_missing_files(toy_index, name: str) -> None:
    prefix, _ = toy_index()
    path = prefix.parent / name
    good = path.read_bytes()
    flip(path)
    with pytest.raises(
        L0MoEError, match=rf"{path.name} is not the file that sample index .* \(sha256 differs\)"
    ):
        CurriculumDataset(prefix)
    path.write_bytes(good[:-4])  # sizes are compared even without checksums
    with pytest.raises(L0MoEError, match=r"is damaged|the size or type of .* differs from the header"):
        CurriculumDataset(prefix, verify=False)
    path.unlink()
    with pytest.raises(L0MoEError, match=f"needs .*{path.name}, which does not exist; run curate again"):
        CurriculumDataset(prefix, verify=False)
    path.write_bytes(good)
    CurriculumDataset(prefix)


def test_header_of_other_sizes(toy_index) -> None:
    prefix, _ = toy_index()
    file = index_files(prefix)[0]
    header = json.loads(file.read_text())
    file.write_text(
        json.dumps(sealed({key: value for key, value in header.items() if key != CHECKSUM} | {"samples": 47}))
    )
    with pytest.raises(L0MoEError, match="the size or type of samples differs"):
        CurriculumDataset(prefix)
    np.save(index_files(prefix)[2], np.zeros(48, dtype=np.int64))
    file.write_text(json.dumps(header))
    with pytest.raises(L0MoEError, match="the size or type of samples differs"):
        CurriculumDataset(prefix, verify=False)


UNEQUAL = {2: 4, 1: 6}


def global_batches(
    dataset: CurriculumDataset, dp: int, workers: int, consumed: int = 0
) -> list[list[torch.Tensor]]:
    """Return the tokens of each global batch of 8, as the loaders of all ranks deliver them."""
    loaders = []
    for rank in range(dp):
        sampler = MegatronPretrainingSampler(len(dataset), consumed, 1, rank, dp)
        loaders.append(iter(DataLoader(dataset, batch_sampler=sampler, num_workers=workers)))
    steps = (len(dataset) - consumed) // 8
    return [[next(loader) for _ in range(8 // dp) for loader in loaders] for _ in range(steps)]


@pytest.mark.parametrize(("dp", "workers"), [(1, 0), (1, 2), (2, 1), (4, 0)])
def test_global_batches_are_the_same_for_every_layout(toy_index, dp: int, workers: int) -> None:
    """Sets of unequal length, Megatron's own sampler, loader workers, and a resume by consumed samples only."""
    dataset = CurriculumDataset(toy_index(rounds=UNEQUAL)[0])
    assert dataset.header.iteration_start_samples == [0, 16]
    assert len(dataset) == 16 + 24
    for consumed in (0, 24):
        batches = global_batches(dataset, dp, workers, consumed)
        assert len(batches) == 5 - consumed // 8
        for number, batch in enumerate(batches):
            first = consumed + 8 * number
            expected = [dataset[i]["tokens"] for i in range(first, first + 8)]
            assert torch.equal(torch.cat([item["tokens"] for item in batch]), torch.stack(expected))
            assert sorted(int(item["domain"]) for item in batch) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_another_order_is_seen(toy_index) -> None:
    """Control of the test above: one step more or less gives other batches."""
    dataset = CurriculumDataset(toy_index(rounds=UNEQUAL)[0])
    (first, *_), (second, *_) = global_batches(dataset, 1, 0), global_batches(dataset, 1, 0, consumed=1)
    assert not torch.equal(first[0]["tokens"], second[0]["tokens"])


@pytest.mark.parametrize(
    ("field", "value"), [("doc_pos", 10**9), ("doc_pos", -(10**9)), ("offset", 2**32 - 1)], ids=str
)
def test_a_record_that_points_outside(toy_index, field: str, value: int) -> None:
    prefix, _ = toy_index()
    samples = np.load(index_files(prefix)[2])
    samples[3][field] = value
    np.save(index_files(prefix)[2], samples)
    dataset = CurriculumDataset(prefix, verify=False)
    dataset[2]
    with pytest.raises(L0MoEError, match=r"Record 3 of sample index .* points outside its files"):
        dataset[3]


def test_opening_reads_no_lengths(toy_index, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of 30B tokens has 15M documents: opening it must not touch them all."""
    prefix, _ = toy_index()
    touched = []
    monkeypatch.setattr("megatron_l0moe.index.verify.sha256_file", lambda path: touched.append(path))
    CurriculumDataset(prefix, verify=False)
    assert touched == []
    with pytest.raises(L0MoEError, match="sha256 differs"):  # control: None is no checksum
        CurriculumDataset(prefix, verify=True)


STEP = 8  # sequences: two of each of four domains


@pytest.mark.parametrize(("size", "micro_batch"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("step", [0, 3])
def test_domains_are_those_of_the_batches(toy_index, size: int, micro_batch: int, step: int) -> None:
    prefix, _ = toy_index()
    dataset, domains = CurriculumDataset(prefix), SampleDomains(prefix)
    number = STEP // (size * micro_batch)
    seen = []
    for rank in range(size):
        sampler = MegatronPretrainingSampler(len(dataset), step * STEP, micro_batch, rank, size)
        batches = itertools.islice(iter(sampler), number)
        expected = [[int(dataset[i]["domain"]) for i in batch] for batch in batches]
        got = domains.of_rank(
            step * STEP, num_micro_batches=number, micro_batch=micro_batch, rank=rank, size=size
        )
        assert got.dtype == np.int64
        assert got.tolist() == expected
        seen.append(got)
    assert domains.num_domains == 4
    assert np.bincount(np.concatenate(seen).reshape(-1)).tolist() == [2, 2, 2, 2]
    assert size == 1 or seen[0].tolist() != seen[1].tolist()  # control: a wrong rank would show


def test_damaged_index(toy_index) -> None:
    prefix, _ = toy_index()
    index_files(prefix)[2].write_bytes(b"no array")
    with pytest.raises(L0MoEError, match=r"samples\.npy cannot be read .* run the curate stage again"):
        SampleDomains(prefix)


def test_domain_that_the_header_does_not_have(toy_index) -> None:
    prefix, _ = toy_index()
    domains = SampleDomains(prefix)
    domains.num_domains = 3
    with pytest.raises(L0MoEError, match="holds a sample of domain 3, and its header has 3 domains"):
        domains.of_rank(0, num_micro_batches=4, micro_batch=1, rank=0, size=1)

"""The domains of a rank's samples against what Megatron's sampler hands to that rank."""

import itertools

import numpy as np
import pytest
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.index.dataset import CurriculumDataset, SampleDomains
from megatron_l0moe.index.index import index_files

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

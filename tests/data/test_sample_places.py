"""The samples of a step, against what the dataset serves."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.index.dataset import CurriculumDataset
from megatron_l0moe.index.index import SamplePlace, describe_places, samples_of_step

BATCH, SAMPLES = 8, 48  # p * K, and two iterations of 6 rounds of K = 4
Index = Callable[..., Any]


def first_token(prefix: Path, place: SamplePlace) -> int:
    shard = IndexedDataset(str(prefix.parent / place.shard))
    return int(shard.get(place.document, offset=place.offset, length=1)[0])


@pytest.mark.parametrize("step", [1, 2, 6])
def test_places_are_those_of_the_samples_that_the_step_reads(toy_index: Index, step: int) -> None:
    prefix, _ = toy_index()
    dataset = CurriculumDataset(prefix)
    places = samples_of_step(prefix, step, BATCH)
    assert [place.sample for place in places] == list(range((step - 1) * BATCH, step * BATCH))
    for place in places:
        served = dataset[place.sample]
        assert first_token(prefix, place) == int(served["tokens"][0])
        assert place.domain == int(served["domain"])
    assert {place.iteration for place in places} == {2 if step < 4 else 1}
    assert {place.shard.split("/")[0] for place in places} == {f"iter_{2 if step < 4 else 1:03d}"}


def test_another_step_reads_other_samples(toy_index: Index) -> None:
    prefix, _ = toy_index()
    dataset = CurriculumDataset(prefix)
    places = samples_of_step(prefix, 2, BATCH)
    assert any(
        first_token(prefix, place) != int(dataset[place.sample + BATCH]["tokens"][0]) for place in places
    )


def test_words(toy_index: Index) -> None:
    prefix, _ = toy_index()
    words = describe_places(prefix, samples_of_step(prefix, 2, BATCH))
    assert words.startswith(f"samples 8 to 15 of {prefix} (domains 0, 1, 2, 3; the first begins at token ")
    assert re.search(r" token \d+ of document \d+ in iter_002/shard_0000[01]\.bin\)$", words)
    assert describe_places(prefix, samples_of_step(prefix, SAMPLES // BATCH + 1, BATCH)) == (
        f"no samples of {prefix}, which is shorter"
    )
    with pytest.raises(L0MoEError, match="does not exist; run the curate stage first"):
        samples_of_step(prefix.with_name("none"), 1, BATCH)

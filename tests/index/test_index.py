"""The sample index: packing by hand, then the invariants that training relies on.

The samples of a step, against what the dataset serves.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.index.dataset import CurriculumDataset
from megatron_l0moe.index.index import (
    SAMPLE,
    SamplePlace,
    check_batching,
    describe_places,
    index_files,
    interleave,
    load_header,
    mix,
    pack,
    samples_of_step,
)


def load(prefix: Path) -> np.ndarray:
    return np.load(index_files(prefix)[2])


def test_pack_by_hand() -> None:
    """Documents of 3, 4, 1, 6 tokens, S = 4: samples start at stream tokens 0, 4, 8."""
    documents, offsets = pack(np.array([3, 4, 1, 6]), 3, 4)
    assert documents.tolist() == [0, 1, 3]
    assert offsets.tolist() == [0, 1, 0]


def test_pack_needs_one_token_more_than_the_sequences() -> None:
    pack(np.array([8, 1]), 2, 4)
    with pytest.raises(AssertionError, match="not filled"):
        pack(np.array([8]), 2, 4)


def test_record_is_16_bytes() -> None:
    assert SAMPLE.itemsize == 16


def test_interleave_by_hand() -> None:
    lists = [np.array([(10 * k + j, 0, k, 0) for j in range(4)], dtype=SAMPLE) for k in range(3)]

    def positions(**options) -> list[int]:
        return interleave(lists, **options)["doc_pos"].tolist()

    assert positions(rotate=False, first_round=0) == [0, 10, 20, 1, 11, 21, 2, 12, 22, 3, 13, 23]
    assert positions(rotate=True, first_round=0) == [0, 10, 20, 11, 21, 1, 22, 2, 12, 3, 13, 23]
    assert positions(rotate=True, first_round=2) == [20, 0, 10, 1, 11, 21, 12, 22, 2, 23, 3, 13]


@pytest.mark.parametrize("rotate", [True, False])
def test_every_global_batch_holds_p_of_each_domain(toy_index, rotate: bool) -> None:
    prefix, _ = toy_index(rotate=rotate)
    header, samples = load_header(prefix), load(prefix)
    assert len(samples) == header.samples == 2 * 6 * 4
    batch = header.sequences_per_domain * header.num_domains
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        assert Counter(part["cluster"].tolist()) == dict.fromkeys(range(4), 2)
        assert len(set(part["iter"].tolist())) == 1  # a batch never spans two sets
    assert header.order == [2, 1]
    assert header.iteration_start_samples == [0, 24]
    assert samples["iter"].tolist() == [2] * 24 + [1] * 24


def test_mix_is_a_shuffle_of_the_domains() -> None:
    """Against a loop: the domains of a set in a random order, each giving its next sample."""
    lists = [np.array([(10 * k + j, 0, k, 0) for j in range(4)], dtype=SAMPLE) for k in range(3)]
    waiting = [iter(samples.tolist()) for samples in lists]
    domains = np.random.default_rng((5, 1)).permutation([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    assert mix(lists, seed=(5, 1)).tolist() == [next(waiting[k]) for k in domains]
    assert (
        mix(lists, seed=(5, 1)).tobytes() != mix(lists, seed=(5, 2)).tobytes()
    )  # another set, another order


def test_random_batches_leave_sets_balanced(toy_index) -> None:
    prefix, _ = toy_index(rotate=False, shuffle_seed=3)
    header, samples = load_header(prefix), load(prefix)
    assert header.batches == "random"
    for start in (0, 24):
        assert Counter(samples["cluster"][start : start + 24].tolist()) == dict.fromkeys(range(4), 6)
    batches = samples["cluster"].reshape(-1, 8)
    assert any(Counter(batch.tolist()) != dict.fromkeys(range(4), 2) for batch in batches)
    assert samples["iter"].tolist() == [2] * 24 + [1] * 24
    other, _ = toy_index(rotate=False, name="balanced")
    assert load_header(other).batches == "balanced"
    # the same samples of each domain in the same order, only mixed in another way
    for cluster in range(4):
        mine, theirs = (array[array["cluster"] == cluster] for array in (samples, load(other)))
        assert mine.tobytes() == theirs.tobytes()
    with pytest.raises(AssertionError, match="no rounds to rotate"):
        toy_index(rotate=True, shuffle_seed=3)


def test_rotation_goes_on_across_iterations(toy_index) -> None:
    samples = load(toy_index(rounds=6)[0])
    first_of_round = samples["cluster"][::4].tolist()
    assert first_of_round == [r % 4 for r in range(12)]
    plain = load(toy_index(rotate=False, name="plain")[0])
    assert plain["cluster"].tolist() == [0, 1, 2, 3] * 12


def test_samples_of_a_cluster_advance_by_s(toy_index) -> None:
    prefix, _ = toy_index()
    header, samples = load_header(prefix), load(prefix)
    docs = np.load(index_files(prefix)[1])
    # Copies: Megatron's arrays are views of a file mapping that ends with the dataset.
    lengths = [IndexedDataset(str(prefix.parent / shard.path)) for shard in header.shards]
    lengths = [np.array(dataset.sequence_lengths) for dataset in lengths]
    ends = np.cumsum([lengths[int(d["shard"])][int(d["doc"])] for d in docs])
    for iteration in (1, 2):
        for cluster in range(4):
            mine = samples[(samples["iter"] == iteration) & (samples["cluster"] == cluster)]
            begins = np.concatenate([[0], ends])[mine["doc_pos"]] + mine["offset"]
            assert np.diff(begins).tolist() == [8] * 5


def dp_batches(total: int, gbs: int, mbs: int, dp: int, consumed: int = 0) -> list[list[int]]:
    """Global batches as Megatron's own sampler deals them out to the ranks."""
    ranks = [iter(MegatronPretrainingSampler(total, consumed, mbs, rank, dp)) for rank in range(dp)]
    batches = []
    for _ in range((total - consumed) // gbs):
        batches.append([i for _ in range(gbs // (mbs * dp)) for rank in ranks for i in next(rank)])
    return batches


@pytest.mark.parametrize(("mbs", "dp"), [(1, 1), (1, 2), (2, 2), (1, 4), (2, 4), (1, 8)])
@pytest.mark.parametrize("shuffle_seed", [None, 3], ids=["balanced", "random"])
def test_order_is_the_same_for_every_data_parallel_size(
    toy_index, mbs: int, dp: int, shuffle_seed: int
) -> None:
    header = load_header(toy_index(rotate=shuffle_seed is None, shuffle_seed=shuffle_seed)[0])
    check_batching(header, global_batch_size=8, micro_batch_size=mbs, data_parallel_size=dp)
    expected = [list(range(start, start + 8)) for start in range(0, header.samples, 8)]
    assert dp_batches(header.samples, 8, mbs, dp) == expected
    assert dp_batches(header.samples, 8, mbs, dp, consumed=16) == expected[2:]  # resume in any layout


def test_rotation_shows_every_domain_to_a_rank(toy_index) -> None:
    def seen_by_rank_0(samples: np.ndarray) -> set[int]:
        sampler = MegatronPretrainingSampler(len(samples), 0, 1, 0, 4)
        return {int(samples["cluster"][i]) for batch in sampler for i in batch}

    assert seen_by_rank_0(load(toy_index()[0])) == {0, 1, 2, 3}
    assert seen_by_rank_0(load(toy_index(rotate=False, name="plain")[0])) == {0}  # why it is rotated


def test_same_input_same_bytes(toy_index) -> None:
    first = [path.read_bytes() for path in index_files(toy_index()[0])]
    assert [path.read_bytes() for path in index_files(toy_index()[0])] == first


def test_check_batching_refuses(toy_index) -> None:
    header = load_header(toy_index()[0])
    with pytest.raises(L0MoEError, match=r"global batch size \(16\) must be p \* K = 2 \* 4 = 8"):
        check_batching(header, global_batch_size=16, micro_batch_size=1, data_parallel_size=1)
    random = load_header(toy_index(rotate=False, shuffle_seed=3, name="random")[0])
    with pytest.raises(L0MoEError, match=r"must be p \* K = 2 \* 4 = 8, so that no batch spans two sets;"):
        check_batching(random, global_batch_size=16, micro_batch_size=1, data_parallel_size=1)
    with pytest.raises(L0MoEError, match=r"\(8\) must be divisible by .* \(3 \* 1\)"):
        check_batching(header, global_batch_size=8, micro_batch_size=3, data_parallel_size=1)
    expert = load_header(toy_index(kind="expert", name="expert_000")[0])
    check_batching(expert, global_batch_size=16, micro_batch_size=1, data_parallel_size=4)


def test_bad_headers(toy_index, tmp_path: Path) -> None:
    with pytest.raises(L0MoEError, match=r"nothing\.ccm\.json does not exist; run the curate stage"):
        load_header(tmp_path / "nothing")
    prefix, _ = toy_index()
    file = index_files(prefix)[0]
    good = json.loads(file.read_text())
    del good["checksum"]  # what is edited here would be refused for it
    for content, message in (
        ({**good, "version": 1}, "has version 1, this program reads version 2"),
        ([], "must hold a JSON object"),
        ({**good, "extra": 1}, r"missing or unknown keys \(extra\)"),
        ({k: v for k, v in good.items() if k != "eod"}, r"missing or unknown keys \(eod\)"),
        ({**good, "samples": "many"}, "has a wrong value for samples"),
        ({**good, "samples": None}, "has a wrong value for samples"),
        ({**good, "kind": "other"}, "has a wrong value for kind"),
        ({**good, "batches": "other"}, "has a wrong value for batches"),
        ({**good, "shards": [{"path": "x"}]}, r"has a wrong value for shards\.0\.bin_sha256"),
        ({**good, "shards": "x"}, "has a wrong value for shards"),
        ({**good, "seq_length": 0}, "sizes that do not fit each other"),
        ({**good, "order": [1]}, "sizes that do not fit each other"),
        ({**good, "iteration_start_samples": [0, 48]}, "sizes that do not fit each other"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(L0MoEError, match=message):
            load_header(prefix)
    file.write_text("{")
    with pytest.raises(L0MoEError, match="is not valid JSON"):
        load_header(prefix)


EDITS = {
    "order": [1, 2],
    "eod": 7,
    "rotate": False,
    "kind": "expert",
    "tokenizer_sha256": "0" * 64,
    "d_ds": [0.5, 0.25],
    "iterations": 9,
    "batches": "random",
    "vocab_size": 4096,
}


def test_a_header_is_part_of_its_own_checksum(toy_index):
    """Each of these edits fits the rest, so nothing else would notice it."""
    prefix, _ = toy_index()
    file, header = index_files(prefix)[0], load_header(prefix)
    written = json.loads(file.read_text())
    for key, value in EDITS.items():
        assert written[key] != value
        file.write_text(json.dumps({**written, key: value}))
        with pytest.raises(L0MoEError, match=r"moe\.ccm\.json was changed after it was written"):
            load_header(prefix)
    file.write_text(json.dumps(written, indent=7, sort_keys=True))  # control: the same values
    assert load_header(prefix) == header
    del written["checksum"]  # as earlier versions wrote it
    file.write_text(json.dumps(written))
    assert load_header(prefix) == header


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

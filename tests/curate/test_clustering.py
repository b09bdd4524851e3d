"""Spherical k-means: recovers clear clusters, reproducible, whatever the vectors lie in; labels can be renamed."""

import logging
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from megatron_l0moe.curate import clustering
from megatron_l0moe.curate.clustering import Clustering, nearest_centre, random_clusters, spherical_kmeans
from megatron_l0moe.curate.embedding import VectorShards
from megatron_l0moe.errors import L0MoEError

UNIT_LENGTH_ATOL = 1e-5  # float32


def blobs(counts: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    vectors = np.eye(16)[labels] + rng.normal(size=(len(labels), 16)) * 0.05
    order = rng.permutation(len(labels))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)[order], labels[order]


def test_recovers_clear_clusters() -> None:
    vectors, labels = blobs([60, 400, 900, 40])  # more than faiss' 256 points a centroid
    found = spherical_kmeans(vectors, 4, seed=1)
    assert len({(a, b) for a, b in zip(labels.tolist(), found.assignment.tolist(), strict=True)}) == 4
    np.testing.assert_allclose(np.linalg.norm(found.centres, axis=1), 1, atol=UNIT_LENGTH_ATOL)
    for k in range(4):  # a centre is the mean direction of all its points
        mean = vectors[found.assignment == k].mean(axis=0)
        assert found.centres[k] @ mean / np.linalg.norm(mean) > 0.9999


def test_same_seed_same_bytes() -> None:
    vectors, _ = blobs([50, 60, 70])
    first, again = (spherical_kmeans(vectors, 5, seed=3) for _ in range(2))
    assert first.centres.tobytes() == again.centres.tobytes()
    assert spherical_kmeans(vectors, 5, seed=4).centres.tobytes() != first.centres.tobytes()


def test_relabelled() -> None:
    clustering = Clustering(np.eye(3, dtype=np.float32), np.array([0, 1, 2, 1]))
    renamed = clustering.relabelled(np.array([2, 0, 1]))  # new 0 is old 2, new 1 is old 0, new 2 is old 1
    assert renamed.assignment.tolist() == [1, 2, 0, 2]
    assert nearest_centre(clustering.centres[[0, 1, 2, 1]], renamed.centres).tolist() == [1, 2, 0, 2]


def test_fewer_documents_than_clusters() -> None:
    with pytest.raises(L0MoEError, match=r"3 document\(s\) cannot make model\.num_experts = 4 clusters"):
        spherical_kmeans(np.eye(3, dtype=np.float32), 4, seed=0)


def test_few_points_are_what_bare_faiss_makes_of_all() -> None:
    """Below the limit all points are used: the centres are faiss' own, to the byte."""
    vectors, _ = blobs([60, 300, 90])
    bare = faiss.Kmeans(
        16, 3, niter=clustering.LLOYD_ITERATIONS, nredo=clustering.RESTARTS, spherical=True, seed=7,
        init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS, max_points_per_centroid=450,
    )  # fmt: skip
    bare.train(vectors)
    found = spherical_kmeans(vectors, 3, seed=7)
    assert found.centres.tobytes() == bare.centroids.tobytes()
    assert found.assignment.tolist() == np.argmax(vectors @ bare.centroids.T, axis=1).tolist()
    assert (
        found.centres.tobytes()
        != spherical_kmeans(vectors, 3, seed=7, points_per_cluster=100).centres.tobytes()
    )


def test_many_points_are_drawn_and_all_are_assigned(caplog: pytest.LogCaptureFixture) -> None:
    vectors, labels = blobs([60, 400, 900, 40])
    with caplog.at_level(logging.INFO):
        found = spherical_kmeans(vectors, 4, seed=1, points_per_cluster=50)
    assert len({(a, b) for a, b in zip(labels.tolist(), found.assignment.tolist(), strict=True)}) == 4
    assert "200 of 1400 vectors, faiss on the CPU" in caplog.text
    assert "documents per cluster: 40 to 900, mean 350.0" in caplog.text
    again = spherical_kmeans(vectors, 4, seed=1, points_per_cluster=50)
    assert again.centres.tobytes() == found.centres.tobytes()
    rows = [clustering._training_points(vectors, 200, seed) for seed in (1, 2)]
    assert rows[0].shape == (200, 16)
    assert len(np.unique(rows[0], axis=0)) == 200  # none is drawn twice
    assert rows[0].tobytes() != rows[1].tobytes()


@pytest.mark.parametrize("limit", [50, 4096], ids=["drawn", "all"])
@pytest.mark.parametrize("block", [7, 1 << 13])
def test_blocks_and_files_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, block: int
) -> None:
    vectors = blobs([60, 300, 90])[0].astype(np.float16)
    whole = spherical_kmeans(vectors.astype(np.float32), 3, seed=1, points_per_cluster=limit)
    monkeypatch.setattr(clustering, "BLOCK_ROWS", block)
    files = [tmp_path / f"{n}.npy" for n in range(3)]
    for file, part in zip(files, np.split(vectors, [100, 333]), strict=True):
        np.save(file, part)
    np.save(tmp_path / "whole.npy", vectors)
    for source in (vectors, np.load(tmp_path / "whole.npy", mmap_mode="r"), VectorShards(files)):
        found = spherical_kmeans(source, 3, seed=1, points_per_cluster=limit)
        assert found.centres.tobytes() == whole.centres.tobytes()
        assert found.assignment.tolist() == whole.assignment.tolist()


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, 3.0], ids=["zero", "nan", "infinite", "long"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_damaged_embedding_is_named(
    monkeypatch: pytest.MonkeyPatch, bad: float, dtype: type[np.floating[Any]]
) -> None:
    monkeypatch.setattr(clustering, "BLOCK_ROWS", 64)
    vectors = blobs([60, 300, 90])[0].astype(dtype)
    centres = spherical_kmeans(vectors, 3, seed=1).centres
    vectors[222] = bad
    for read in (
        lambda: spherical_kmeans(vectors, 3, seed=1),
        lambda: random_clusters(vectors, 3, seed=1),
        lambda: nearest_centre(vectors, centres),
    ):
        with pytest.raises(L0MoEError, match=r"Embedding 222 is not a vector of length 1"):
            read()


def test_random_clusters_against_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "BLOCK_ROWS", 64)
    vectors, labels = blobs([60, 300, 92])
    found = random_clusters(vectors, 5, seed=3)
    assert sorted(np.bincount(found.assignment).tolist()) == [90, 90, 90, 91, 91]
    for k in range(5):
        mean = np.mean(
            [v for v, a in zip(vectors.tolist(), found.assignment.tolist(), strict=True) if a == k], axis=0
        )
        np.testing.assert_allclose(found.centres[k], mean / np.linalg.norm(mean), atol=UNIT_LENGTH_ATOL)
    share = [np.mean(labels[found.assignment == k] == 1) for k in range(5)]
    assert max(share) - min(share) < 0.3  # the folds do not know the topics
    assert random_clusters(vectors, 5, seed=3).assignment.tolist() == found.assignment.tolist()
    assert random_clusters(vectors, 5, seed=4).assignment.tolist() != found.assignment.tolist()
    with pytest.raises(L0MoEError, match=r"3 document\(s\) cannot make model\.num_experts = 4 clusters"):
        random_clusters(np.eye(3, dtype=np.float32), 4, seed=0)


@pytest.mark.parametrize("gpus", [0, 2])
def test_faiss_is_asked_for_a_gpu_only_where_it_has_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, gpus: int
) -> None:
    """faiss runs on the CPU without a word when it is asked for a GPU that is not there."""
    asked: list[bool] = []
    kmeans = faiss.Kmeans

    def on_the_cpu(*sizes: int, gpu: bool, **settings: Any) -> Any:
        asked.append(gpu)
        return kmeans(*sizes, **settings)

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: gpus)
    monkeypatch.setattr(faiss, "Kmeans", on_the_cpu)
    with caplog.at_level(logging.INFO):
        spherical_kmeans(blobs([20, 30])[0], 2, seed=1)
    assert asked == [gpus > 0]
    assert f"faiss on {'2 GPU(s)' if gpus else 'the CPU'}" in caplog.text

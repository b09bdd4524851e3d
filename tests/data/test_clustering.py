"""Spherical k-means: recovers clear clusters, reproducible, all points used, labels can be renamed."""

import numpy as np
import pytest

from megatron_l0moe.data.clustering import Clustering, nearest_centre, spherical_kmeans
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

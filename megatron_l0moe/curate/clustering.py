"""Spherical k-means with faiss (paper section 3.1, step 2), in memory that does not grow with the documents.

Shape letters: N = documents, V = embedding dimension, K = clusters, M = points that k-means is trained on.
Vectors have length 1 and are read in blocks, so that N may be larger than what fits into memory.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from megatron_l0moe.curate.embedding import VectorShards
from megatron_l0moe.errors import L0MoEError

logger = logging.getLogger(__name__)

LLOYD_ITERATIONS = 25
RESTARTS = 4
"""k-means++ starts; faiss keeps the best. With random points as starts a small clear domain is often not found."""
POINTS_PER_CLUSTER = 2048
"""Up to this many points a cluster all are used, else so many are drawn at random; the cost is that of the points.
Mean cosine to the nearest centre, 300,000 synthetic vectors, K = 64, one seed: 0.343 with faiss' own 256 points, 0.351
with 1024, 0.350 with 2048, 0.354 with 4096, which is nearly all."""
BLOCK_ROWS = 1 << 13
"""Vectors that are read at a time: 32 MB at V = 1024."""
LENGTH_ATOL = 1e-2
"""A vector that was rounded to float16 has length 1 to 1e-3; a damaged one is far from it."""

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Vectors = npt.NDArray[np.floating[Any]] | VectorShards
"""[N, V], float16 or float32: an array, a memory map, or several files."""


@dataclass(frozen=True)
class Clustering:
    """Clusters of one iteration's documents."""

    centres: Floats
    """[K, V], unit length."""
    assignment: Ids
    """[N], cluster of each document; of k-means the nearest centre by cosine."""

    def relabelled(self, permutation: Ids) -> "Clustering":
        """Return the same clusters with new label i for the old label ``permutation[i]``."""
        inverse = np.empty_like(permutation)
        inverse[permutation] = np.arange(len(permutation))
        return Clustering(self.centres[permutation], inverse[self.assignment])


def spherical_kmeans(
    vectors: Vectors, num_clusters: int, *, seed: int, points_per_cluster: int = POINTS_PER_CLUSTER
) -> Clustering:
    """Cluster unit vectors [N, V] by cosine, reproducibly, on the GPUs if faiss finds any.

    Trained on all points, or on K * ``points_per_cluster`` random ones where there are more; every document is then
    assigned to its nearest centre. On the CPU one thread is used: the result must not depend on the number of cores.

    Raises:
        L0MoEError: fewer documents than clusters, or a vector that is not of length 1.
    """
    count, dimension = _check_enough(vectors, num_clusters)
    points = _training_points(vectors, num_clusters * points_per_cluster, seed)
    # faiss.Kmeans(gpu=True) says nothing where there is no GPU, and runs on the CPU.
    gpus = faiss.get_num_gpus()
    where = f"{gpus} GPU(s)" if gpus else "the CPU"
    logger.info("k-means: K = %d, %d of %d vectors, faiss on %s", num_clusters, len(points), count, where)
    with _one_thread():
        kmeans = faiss.Kmeans(
            dimension,
            num_clusters,
            niter=LLOYD_ITERATIONS,
            nredo=RESTARTS,
            spherical=True,
            seed=seed,
            gpu=gpus > 0,
            init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
            min_points_per_centroid=1,
            max_points_per_centroid=len(points),  # faiss would otherwise draw 256 points a centroid
        )
        kmeans.train(points)
    centres = np.asarray(kmeans.centroids, dtype=np.float32).reshape(num_clusters, dimension)
    return _reported(Clustering(centres, nearest_centre(vectors, centres)))


def random_clusters(vectors: Vectors, num_clusters: int, *, seed: int) -> Clustering:
    """Split documents at random into K folds of equal size, to one: the paper's ablation "without k-means".

    A fold's centre is the direction of the mean of its vectors, so that eq. 4 and 5 can still be computed.

    Raises:
        L0MoEError: fewer documents than clusters, or a vector that is not of length 1.
    """
    count, dimension = _check_enough(vectors, num_clusters)
    assignment = np.random.default_rng(seed).permutation(count) % num_clusters
    sums = np.zeros((num_clusters, dimension), dtype=np.float64)
    for start, block in _blocks(vectors):
        here = assignment[start : start + len(block)]
        for k in range(num_clusters):
            sums[k] += block[here == k].sum(axis=0, dtype=np.float64)
    centres = (sums / np.linalg.norm(sums, axis=1, keepdims=True)).astype(np.float32)
    return _reported(Clustering(centres, assignment))


def nearest_centre(vectors: Vectors, centres: Floats) -> Ids:
    """Return the centre with the largest cosine for each unit vector, int64 [N]; ties go to the lower number."""
    nearest = np.empty(vectors.shape[0], dtype=np.int64)
    for start, block in _blocks(vectors):
        nearest[start : start + len(block)] = np.argmax(block @ centres.T, axis=1)
    return nearest


def _check_enough(vectors: Vectors, num_clusters: int) -> tuple[int, int]:
    count, dimension = vectors.shape
    if count < num_clusters:
        raise L0MoEError(
            f"{count} document(s) cannot make model.num_experts = {num_clusters} clusters; add documents to "
            "data.corpus, or lower data.iterations or model.num_experts."
        )
    return count, dimension


def _training_points(vectors: Vectors, limit: int, seed: int) -> Floats:
    """Return float32 [M, V]: all vectors, or ``limit`` random ones in their order."""
    count, dimension = vectors.shape
    rows = None
    if count > limit:
        rows = np.sort(np.random.default_rng(seed).choice(count, limit, replace=False, shuffle=False))
    points = np.empty((count if rows is None else limit, dimension), dtype=np.float32)
    for start, block in _blocks(vectors, rows):
        points[start : start + len(block)] = block
    return points


def _blocks(vectors: Vectors, rows: Ids | None = None) -> Iterator[tuple[int, Floats]]:
    """Yield (first, float32 [<= BLOCK_ROWS, V]) over all vectors or over the given rows."""
    count = vectors.shape[0] if rows is None else len(rows)
    for start in range(0, count, BLOCK_ROWS):
        wanted = slice(start, min(start + BLOCK_ROWS, count))
        block = np.asarray(vectors[wanted if rows is None else rows[wanted]], dtype=np.float32)
        wrong = ~(np.abs(np.einsum("nv,nv->n", block, block) - 1) < 2 * LENGTH_ATOL)  # also where it is NaN
        if wrong.any():
            place = start + int(np.argmax(wrong))
            raise L0MoEError(
                f"Embedding {place if rows is None else int(rows[place])} is not a vector of length 1 (zero, not "
                "finite, or damaged); remove the embeddings and start curate again."
            )
        yield start, block


def _reported(clustering: Clustering) -> Clustering:
    sizes = np.bincount(clustering.assignment, minlength=len(clustering.centres))
    logger.info("documents per cluster: %d to %d, mean %.1f", sizes.min(), sizes.max(), sizes.mean())
    return clustering


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)

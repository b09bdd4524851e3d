"""Spherical k-means with faiss (paper section 3.1, step 2).

Shape letters: N = documents, V = embedding dimension, K = clusters.
"""

from dataclasses import dataclass

import faiss
import numpy as np
import numpy.typing as npt

from megatron_l0moe.errors import L0MoEError

LLOYD_ITERATIONS = 25
RESTARTS = 4
"""k-means++ starts; faiss keeps the best. With random points as starts a small clear domain is often not found."""


@dataclass(frozen=True)
class Clustering:
    """Clusters of one iteration's documents."""

    centres: npt.NDArray[np.float32]
    """[K, V], unit length."""
    assignment: npt.NDArray[np.int64]
    """[N], nearest centre (cosine) of each document."""

    def relabelled(self, permutation: npt.NDArray[np.int64]) -> "Clustering":
        """Return the same clusters with new label i for the old label ``permutation[i]``."""
        inverse = np.empty_like(permutation)
        inverse[permutation] = np.arange(len(permutation))
        return Clustering(self.centres[permutation], inverse[self.assignment])


def spherical_kmeans(vectors: npt.NDArray[np.float32], num_clusters: int, *, seed: int) -> Clustering:
    """Cluster unit vectors float32 [N, V] by cosine, over all points, reproducibly.

    Runs on one thread: the result must not depend on the number of cores.

    Raises:
        L0MoEError: fewer documents than clusters.
    """
    count, dimension = vectors.shape
    if count < num_clusters:
        raise L0MoEError(
            f"{count} document(s) cannot make model.num_experts = {num_clusters} clusters; add documents to "
            "data.corpus, or lower data.iterations or model.num_experts."
        )
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        kmeans = faiss.Kmeans(
            dimension,
            num_clusters,
            niter=LLOYD_ITERATIONS,
            nredo=RESTARTS,
            spherical=True,
            seed=seed,
            init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
            min_points_per_centroid=1,
            max_points_per_centroid=count,  # faiss would otherwise train on 256 points a centroid
        )
        kmeans.train(np.ascontiguousarray(vectors))
    finally:
        faiss.omp_set_num_threads(threads)
    centres = np.asarray(kmeans.centroids, dtype=np.float32).reshape(num_clusters, dimension)
    return Clustering(centres, nearest_centre(vectors, centres))


def nearest_centre(
    vectors: npt.NDArray[np.float32], centres: npt.NDArray[np.float32]
) -> npt.NDArray[np.int64]:
    """Return the centre with the largest cosine for each unit vector, int64 [N]; ties go to the lower number."""
    return np.argmax(vectors @ centres.T, axis=1).astype(np.int64)

"""What benchmarks/curation.py measures, each in a process of its own; prints one JSON line. Not for use by hand.

    python benchmarks/curation_workers.py WORKER JSON

WORKER is a function of this file, JSON its arguments. `seconds` and `cpu_seconds` are those of the work alone, without
imports and set-up; `base_mb` and `peak_mb` are the resident memory before the work and the most that the process had.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 8192
TOPICS = 200
UNLIMITED = 1 << 40


class Clock:
    """Wall and processor seconds of a block, and the memory around it."""

    def __enter__(self) -> "Clock":
        self.base = memory("VmRSS")
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        self.numbers = {
            "seconds": self.wall,
            "cpu_seconds": self.cpu,
            "base_mb": self.base,
            "peak_mb": memory("VmHWM"),
        }


def memory(key: str) -> float:
    """Return a line of /proc/self/status in MB; unlike getrusage's, its peak is that of this program only."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise LookupError(key)


def make_text(corpus: str, out: str, characters: int, model: str) -> dict[str, Any]:
    """Write documents of a corpus, as much of each shard, to a .jsonl file until they have so many characters.

    Documents that quote a special token are left out: other tools take it for special, and we for text.
    """
    from megatron_l0moe.curate.corpus.shard_files import open_corpus

    source = open_corpus(corpus)
    added = json.loads((Path(model) / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    special = [token["content"] for token in added]
    share, total, count, left_out = characters / len(source.shards), 0, 0, 0
    with Path(out).open("w", encoding="utf-8") as file:
        for number, shard in enumerate(source.shards, start=1):
            for document in source.reader().read_rows(shard):
                if any(token in document.text for token in special):
                    left_out += 1
                    continue
                file.write(json.dumps({"text": document.text}) + "\n")
                total, count = total + len(document.text), count + 1
                if total >= number * share:
                    break
    return {"documents": count, "characters": total, "left_out": left_out}


def tokenise_ours(text: str, model: str, out: str) -> dict[str, Any]:
    """Write a .jsonl file's texts as one shard."""
    from megatron_l0moe.index.tokens import CorpusTokenizer, write_documents

    tokenizer = CorpusTokenizer.load(Path(model))
    with Clock() as clock:
        written = write_documents(Path(out), documents(text), tokenizer, lambda count: None)
    return {"documents": len(written), "tokens": sum(length for _, length in written), **clock.numbers}


def documents(text: str) -> Iterator[tuple[int, str, int]]:
    """Yield (number, text, no limit) of a .jsonl file."""
    with Path(text).open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            yield number, json.loads(line)["text"], UNLIMITED


def tokenise_datatrove(text: str, model: str, out: str, eod_token: str) -> dict[str, Any]:
    """Do the same with datatrove's own writer of Megatron files."""
    from datatrove.data import Document
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer
    from datatrove.utils.logging import logger

    logger.remove()
    writer = MegatronDocumentTokenizer(
        out,
        save_filename="all",
        tokenizer_name_or_path=str(Path(model) / "tokenizer.json"),
        eos_token=eod_token,
    )
    with Clock() as clock:
        writer.run(Document(text=text, id=str(number)) for number, text, _ in documents(text))
    return clock.numbers


def make_vectors(file: str, count: int, dimension: int) -> dict[str, Any]:
    """Write unit vectors around random topics of unequal size, float16 [count, dimension]."""
    rng = np.random.default_rng(0)
    topics = rng.normal(size=(TOPICS, dimension)).astype(np.float32)
    shares = rng.dirichlet(np.ones(TOPICS))
    array = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=(count, dimension))
    for start in range(0, count, BLOCK):
        rows = min(BLOCK, count - start)
        block = topics[rng.choice(TOPICS, rows, p=shares)]
        block += 2 * rng.standard_normal(size=block.shape, dtype=np.float32)
        array[start : start + rows] = block / np.linalg.norm(block, axis=1, keepdims=True)
    array.flush()
    return {}


def kmeans_ours(file: str, clusters: int, points: int | None = None) -> dict[str, Any]:
    """Cluster vectors that lie in a file: draw the training points, train, assign all."""
    from megatron_l0moe.curate.clustering import POINTS_PER_CLUSTER, spherical_kmeans
    from megatron_l0moe.curate.embedding import VectorShards

    vectors = VectorShards([Path(file)])
    with Clock() as clock:
        found = spherical_kmeans(vectors, clusters, seed=1, points_per_cluster=points or POINTS_PER_CLUSTER)
    sizes = np.bincount(found.assignment, minlength=clusters)
    return {
        "objective": objective(vectors, found.centres, found.assignment),
        "smallest": int(sizes.min()),
        "largest": int(sizes.max()),
        **clock.numbers,
    }


def kmeans_bare(file: str, clusters: int, points: int | None = None) -> dict[str, Any]:
    """Give faiss the same training points and settings, and all vectors, in memory as float32; drawing is not timed."""
    import faiss

    from megatron_l0moe.curate import clustering
    from megatron_l0moe.curate.embedding import VectorShards

    vectors = VectorShards([Path(file)])
    limit = clusters * (points or clustering.POINTS_PER_CLUSTER)
    chosen = clustering._training_points(vectors, limit, 1)
    everything = np.load(file).astype(np.float32)
    faiss.omp_set_num_threads(1)
    with Clock() as clock:
        kmeans = faiss.Kmeans(
            vectors.shape[1], clusters, niter=clustering.LLOYD_ITERATIONS, nredo=clustering.RESTARTS, spherical=True,
            seed=1, init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS, min_points_per_centroid=1,
            max_points_per_centroid=len(chosen), gpu=faiss.get_num_gpus() > 0,
        )  # fmt: skip
        kmeans.train(chosen)
        _, nearest = kmeans.assign(everything)
    return {
        "objective": objective(vectors, kmeans.centroids, nearest),
        "points": len(chosen),
        **clock.numbers,
    }


def objective(vectors: Any, centres: Any, assignment: Any) -> float:
    """Return the mean cosine of a vector and its centre."""
    total = 0.0
    for start in range(0, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK].astype(np.float32)
        total += float(
            np.einsum("nv,nv->n", block, centres[assignment[start : start + BLOCK]]).sum(dtype=np.float64)
        )
    return total / len(vectors)


def ccm(clusters: int, iterations: int, dimension: int) -> dict[str, Any]:
    """Match the centres of all iterations, equations 4 and 5, and the order."""
    from megatron_l0moe.curate.ccm import confusion, match_centres, semantic_distance, training_order

    centres = np.random.default_rng(0).normal(size=(iterations, clusters, dimension)).astype(np.float32)
    with Clock() as clock:
        distances = []
        for new in centres[1:]:
            matched = new[match_centres(centres[0], new, method="hungarian")]
            distances.append(semantic_distance(confusion(centres[0], matched, delta=0.1).ccm, beta=0.5))
        training_order(distances, order="ascending", seed=0)
    return clock.numbers


def index(folder: str, samples: int) -> dict[str, Any]:
    """Write the index of MoE training over synthetic documents; the checksums of its files are part of it."""
    from data_index import write_synthetic

    with Clock() as clock:
        write_synthetic(Path(folder), samples, fill=False)
    return clock.numbers


WORKERS: dict[str, Callable[..., dict[str, Any]]] = {
    worker.__name__: worker
    for worker in (
        make_text,
        tokenise_ours,
        tokenise_datatrove,
        make_vectors,
        kmeans_ours,
        kmeans_bare,
        ccm,
        index,
    )
}


if __name__ == "__main__":
    print(json.dumps(WORKERS[sys.argv[1]](**json.loads(sys.argv[2]))))

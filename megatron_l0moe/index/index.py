"""The sample index of one training job: which tokens global sample i is, independent of any parallel layout.

An index P is P.ccm.json (header), P.ccm.docs.npy and P.ccm.samples.npy. Record i of the samples IS global sample i,
so the number of consumed samples is the whole state of the data, for every data-parallel size.

Shape letters: K = clusters = domains, p = sequences of each domain in a global batch, S = sequence length.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs import digests
from megatron_l0moe.runs.stage_folder import sealed, unsealed, whole, write_json
from megatron_l0moe.runtime.json_files import parse_json

VERSION = 2
DOC = np.dtype([("shard", "<u4"), ("doc", "<u4")])
SAMPLE = np.dtype([("doc_pos", "<i8"), ("offset", "<u4"), ("cluster", "<u2"), ("iter", "<u2")])
"""16 bytes: place in the list of documents, first token in that document, domain, iteration number."""

Records = npt.NDArray[np.void]


@dataclass(frozen=True)
class Shard:
    """One .bin/.idx pair of Megatron's IndexedDataset."""

    path: str
    """Prefix without suffix, relative to the folder of the index."""
    bin_sha256: str
    idx_sha256: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class IndexHeader:
    """What P.ccm.json holds."""

    version: int
    kind: Literal["expert", "moe"]
    num_domains: int
    """K."""
    iterations: int
    """Q."""
    seq_length: int
    """S."""
    order: list[int]
    """Iteration numbers in training order."""
    d_ds: list[float]
    """Eq. 5 for the iterations 1..Q-1, by number; empty for an expert."""
    sequences_per_domain: int
    """p; of an expert, whose batches hold one domain: the global batch size."""
    batches: Literal["balanced", "random"]
    """Whether a global batch holds exactly p sequences of each domain, or what a random order of the set gives it."""
    rotate: bool
    tokenizer_sha256: str
    vocab_size: int
    eod: int
    shards: list[Shard]
    samples: int
    iteration_start_samples: list[int]
    """First sample of each entry of `order`."""
    docs_sha256: str
    samples_sha256: str

    @property
    def global_batch_size(self) -> int:
        """Sequences of one step: p * K, or those of an expert's one domain."""
        return self.sequences_per_domain * (self.num_domains if self.kind == "moe" else 1)


@dataclass(frozen=True)
class ClusterBlock:
    """Documents of one cluster of one iteration, in the order in which they are packed."""

    cluster: int
    docs: Records
    """[n] of ``DOC``; `shard` counts the shards of the iteration."""
    lengths: npt.NDArray[np.int64]
    """[n] tokens with EOD."""


@dataclass(frozen=True)
class IterationBlock:
    """One iteration of an index: every cluster gives the same number of samples."""

    iteration: int
    shards: list[Shard]
    clusters: list[ClusterBlock]
    samples_per_cluster: int


def index_files(prefix: Path) -> tuple[Path, Path, Path]:
    """Return the header, documents and samples files of an index."""
    return Path(f"{prefix}.ccm.json"), Path(f"{prefix}.ccm.docs.npy"), Path(f"{prefix}.ccm.samples.npy")


def pack(lengths: npt.NDArray[np.int64], samples: int, seq_length: int) -> tuple[Any, Any]:
    """Return (document, offset) of the first token of each sample, int64 [samples].

    The documents are one stream of tokens; sample j is the S + 1 tokens from j * S on.
    """
    ends = np.cumsum(lengths)
    assert samples == 0 or ends[-1] > samples * seq_length, "the cluster was not filled"
    starts = np.arange(samples, dtype=np.int64) * seq_length
    documents = np.searchsorted(ends, starts, side="right")
    return documents, starts - (ends - lengths)[documents]


def interleave(per_cluster: Sequence[Records], *, rotate: bool, first_round: int) -> Records:
    """Merge K equally long lists of samples into rounds of K: x_1^1..x_1^K, x_2^1.. (paper section 3.3).

    With ``rotate`` round r starts at cluster r mod K (counted from ``first_round``): otherwise a data-parallel rank
    whose share divides K would see the same clusters for ever. A round still holds each cluster once.
    """
    table = np.stack(per_cluster, axis=1)  # [rounds, K]
    rounds, clusters = table.shape
    shift = np.arange(first_round, first_round + rounds) if rotate else np.zeros(rounds, dtype=np.int64)
    columns = (np.arange(clusters)[None, :] + shift[:, None]) % clusters
    return np.asarray(table[np.arange(rounds)[:, None], columns].reshape(-1))


def mix(per_cluster: Sequence[Records], *, seed: Sequence[int]) -> Records:
    """Merge K equally long lists of samples in a random order: the paper's ablation "random batch".

    The domains are shuffled; the samples of one domain stay in their own order, which is random as it is. So they
    still follow each other through the documents, as the verification demands.
    """
    rounds = len(per_cluster[0])
    domains = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(per_cluster)), rounds))
    merged = np.empty(len(domains), dtype=SAMPLE)
    for cluster, samples in enumerate(per_cluster):
        merged[domains == cluster] = samples
    return merged


def write_index(
    prefix: Path, blocks: Sequence[IterationBlock], *, shuffle_seed: int | None = None, **settings: Any
) -> IndexHeader:
    """Write the three files of an index, the header last.

    Args:
        prefix: path without suffix.
        blocks: iterations in training order.
        shuffle_seed: of random batches, which need ``rotate`` false; None: balanced batches.
        settings: the fields of ``IndexHeader`` that are not computed here.
    """
    assert shuffle_seed is None or not settings["rotate"], "random batches have no rounds to rotate"
    docs, samples, starts = [], [], []
    shards: list[Shard] = []
    position = first_round = total = 0
    for block in blocks:
        per_cluster = []
        for cluster in block.clusters:
            listed = cluster.docs.copy()
            listed["shard"] += len(shards)
            docs.append(listed)
            records = np.zeros(block.samples_per_cluster, dtype=SAMPLE)
            document, offset = pack(cluster.lengths, block.samples_per_cluster, settings["seq_length"])
            records["doc_pos"], records["offset"] = document + position, offset
            records["cluster"], records["iter"] = cluster.cluster, block.iteration
            per_cluster.append(records)
            position += len(listed)
        starts.append(total)
        samples.append(
            interleave(per_cluster, rotate=settings["rotate"], first_round=first_round)
            if shuffle_seed is None
            else mix(per_cluster, seed=(shuffle_seed, block.iteration))
        )
        total += len(samples[-1])
        first_round += block.samples_per_cluster
        shards += block.shards
    header_file, docs_file, samples_file = index_files(prefix)
    _save(docs_file, np.concatenate(docs))
    _save(samples_file, np.concatenate(samples))
    header = IndexHeader(
        version=VERSION,
        order=[block.iteration for block in blocks],
        batches="balanced" if shuffle_seed is None else "random",
        shards=shards,
        samples=total,
        iteration_start_samples=starts,
        docs_sha256=digests.begin(docs_file).result(),
        samples_sha256=digests.begin(samples_file).result(),
        **settings,
    )
    write_json(header_file, sealed(asdict(header)))
    return header


def load_header(prefix: Path) -> IndexHeader:
    """Read a header.

    Raises:
        L0MoEError: it is missing, damaged, changed after it was written, or of another version.
    """
    file = index_files(prefix)[0]
    if not file.is_file():
        raise L0MoEError(f"Sample index {file} does not exist; run the curate stage first.")
    mend = "copy the curate folder again, or run the curate stage again"
    values = unsealed(parse_json(file.read_bytes(), f"Sample index {file}", mend), file, mend)
    version = values.get("version")
    if version != VERSION:
        raise L0MoEError(
            f"Sample index {file} has version {version}, this program reads version {VERSION}; run the curate stage "
            "again."
        )
    wrong = sorted(values.keys() ^ {field.name for field in fields(IndexHeader)})
    if wrong:
        raise L0MoEError(
            f"Sample index {file} has missing or unknown keys ({', '.join(wrong)}); run the curate stage again."
        )
    try:
        header: IndexHeader = TypeAdapter(IndexHeader).validate_python(values, strict=False)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise L0MoEError(
            f"Sample index {file} has a wrong value for {key} ({problem['msg']}); run the curate stage again."
        ) from error
    _check_header(file, header)
    return header


def _check_header(file: Path, header: IndexHeader) -> None:
    """Refuse numbers that do not fit each other."""
    starts = header.iteration_start_samples
    sizes = (header.num_domains, header.seq_length, header.sequences_per_domain, header.samples)
    if (
        min(sizes) < 1
        or not starts
        or len(starts) != len(header.order)
        or starts != sorted(starts)
        or starts[0] != 0
        or starts[-1] >= header.samples
    ):
        raise L0MoEError(
            f"Sample index {file} has sizes that do not fit each other (num_domains, seq_length, sequences_per_domain, "
            "samples, order, iteration_start_samples); run the curate stage again."
        )


def check_batching(
    header: IndexHeader, *, global_batch_size: int, micro_batch_size: int, data_parallel_size: int
) -> None:
    """Refuse batch sizes that would break the order of the index.

    Raises:
        L0MoEError: the global batch is not p * K sequences ("moe"), or not whole micro-batches for every rank.
    """
    expected = header.global_batch_size
    if header.kind == "moe" and global_batch_size != expected:
        reason = f"each batch holds {header.sequences_per_domain} sequence(s) of every domain"
        if header.batches == "random":
            reason = "no batch spans two sets"
        raise L0MoEError(
            f"The global batch size ({global_batch_size}) must be p * K = {header.sequences_per_domain} * "
            f"{header.num_domains} = {expected}, so that {reason}; set it to {expected}, or set "
            "moe_training.sequences_per_domain and run curate again."
        )
    step = micro_batch_size * data_parallel_size
    if global_batch_size % step:
        raise L0MoEError(
            f"The global batch size ({global_batch_size}) must be divisible by micro batch size * data-parallel size "
            f"({micro_batch_size} * {data_parallel_size}); lower one of the two."
        )


def _save(path: Path, array: Records) -> None:
    """Save an array atomically."""
    with whole(path) as partial, partial.open("wb") as file:
        np.save(file, array)


@dataclass(frozen=True, kw_only=True)
class SamplePlace:
    """Where a global sample of an index begins."""

    sample: int
    """Global sample, which is the record in P.ccm.samples.npy; the first is 0."""
    domain: int
    iteration: int
    """The iteration of curate, `iter_NN`."""
    shard: str
    """Prefix of the token file, relative to the folder of the index."""
    document: int
    """The document's number in that file."""
    offset: int
    """First token in that document."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def samples_of_step(prefix: Path, step: int, global_batch_size: int) -> list[SamplePlace]:
    """Return the samples of a training step, in their order; all ranks and micro-batches together.

    Args:
        prefix: path of the index without `.ccm.json`.
        step: counted from 1, as in the log and in metrics.jsonl.
        global_batch_size: sequences of one step.
    """
    header = load_header(prefix)
    _, docs_file, samples_file = index_files(prefix)
    first = (step - 1) * global_batch_size
    records = np.load(samples_file, mmap_mode="r")[first : first + global_batch_size]
    docs = np.load(docs_file, mmap_mode="r")
    places = []
    for number, record in enumerate(records, start=first):
        document = docs[int(record["doc_pos"])]
        places.append(
            SamplePlace(
                sample=number,
                domain=int(record["cluster"]),
                iteration=int(record["iter"]),
                shard=header.shards[int(document["shard"])].path,
                document=int(document["doc"]),
                offset=int(record["offset"]),
            )
        )
    return places


def describe_places(prefix: Path, places: list[SamplePlace]) -> str:
    """Return the range of samples, their domains, and where the first one begins, to follow "it read"."""
    if not places:
        return f"no samples of {prefix}, which is shorter"
    first, last = places[0], places[-1]
    domains = sorted({place.domain for place in places})
    shown = ", ".join(map(str, domains[:8])) + (" and others" if len(domains) > 8 else "")
    return (
        f"samples {first.sample} to {last.sample} of {prefix} (domain{'s' if len(domains) > 1 else ''} {shown}; the "
        f"first begins at token {first.offset} of document {first.document} in {first.shard}.bin)"
    )

"""Which documents a training step reads: global samples, their domains, and the places of their first tokens."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_l0moe.data.index import index_files, load_header


@dataclass(frozen=True, kw_only=True)
class SamplePlace:
    """Where a global sample of an index begins."""

    sample: int
    """Global sample, which is the record in P.ccm.samples.npy; the first is 0."""
    domain: int
    iteration: int
    """Of curate, `iter_NN`."""
    shard: str
    """Prefix of the token file, relative to the folder of the index."""
    document: int
    """In that file."""
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

    Raises:
        L0MoEError: the index is missing or damaged.
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


def describe(prefix: Path, places: list[SamplePlace]) -> str:
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

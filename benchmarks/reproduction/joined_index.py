"""One stream out of all sequences of an L0-MoE run, for the dense models that it is compared with.

Shape letters: K = experts, n = sequences of one expert run.
"""

import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from megatron_l0moe.index.index import index_files, load_header
from megatron_l0moe.runs.stage_folder import sha256_file, write_json


def join(curate: Path, num_experts: int, prefix: Path) -> int:
    """Write an index of the K experts' sequences, round by round, then those of MoE training in their order.

    Nothing is copied: its shards are those of the curate stage.

    Returns:
        The number of sequences.
    """
    parts = [curate / f"expert_{k:03d}" for k in range(num_experts)] + [curate / "moe"]
    shards, docs, samples, position = [], [], [], 0
    for part in parts:
        header, (_, docs_file, samples_file) = load_header(part), index_files(part)
        listed, records = np.load(docs_file), np.load(samples_file)
        listed["shard"] += len(shards)
        records["doc_pos"] += position
        records["cluster"] = records["iter"] = 0  # one stream: what reads it knows no domains
        moved = [os.path.relpath(curate / shard.path, prefix.parent) for shard in header.shards]
        shards += [replace(shard, path=path) for shard, path in zip(header.shards, moved, strict=True)]
        position += len(listed)
        docs.append(listed)
        samples.append(records)
    rounds = np.stack(samples[:-1], axis=1).reshape(-1)  # [n, K]
    everything = np.concatenate([rounds, samples[-1]])
    prefix.parent.mkdir(parents=True, exist_ok=True)
    header_file, docs_file, samples_file = index_files(prefix)
    np.save(docs_file, np.concatenate(docs))
    np.save(samples_file, everything)
    joined = replace(
        load_header(parts[0]),
        num_domains=1,
        iterations=1,
        order=[0],
        sequences_per_domain=1,
        shards=shards,
        samples=len(everything),
        iteration_start_samples=[0],
        docs_sha256=sha256_file(docs_file),
        samples_sha256=sha256_file(samples_file),
    )
    write_json(header_file, asdict(joined))
    return len(everything)

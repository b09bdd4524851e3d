"""What the sample index costs at the paper's size, and beside Megatron's GPTDataset on the same tokens.

    python benchmarks/data_index.py [--samples 7340032] [--pairs 40] [--json FILE]

Open: an index of 7.3M samples of 4096 tokens (30B tokens) over one .bin/.idx pair. The .bin is a sparse file: its 60 GB
take no disk, and opening does not read them. Get: the time of `dataset[i]` for random i, ours and GPTDataset's in turns
(ours, stock, stock, ours, ...) in one process; each pair of blocks gives one ratio.
"""

import argparse
import json
import logging
import shlex
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch

from megatron_l0moe.index.dataset import CurriculumDataset
from megatron_l0moe.index.index import DOC, ClusterBlock, IterationBlock, Shard, write_index
from megatron_l0moe.runtime import cpu
from megatron_l0moe.runtime.hardware import describe_machine

SEQ_LENGTH = 4096
CLUSTERS = 64
MEAN_DOCUMENT = 2000
VOCAB = 32000
MEGABYTE = 1 << 20
OPEN_GOAL_SECONDS = 1.0
GET_GOAL = 1.1


def main() -> None:
    """Measure, print a line for each subject, write JSON."""
    cpu.install_training()
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=7_340_032, help="samples of the large index")
    parser.add_argument("--pairs", type=int, default=40, help="pairs of blocks of random reads")
    parser.add_argument("--block", type=int, default=200, help="reads of a block")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_machine(device="cpu", threads=1)
    report: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "machine": machine}
    with tempfile.TemporaryDirectory() as folder, cpu.one_process_group():
        report["open"] = measure_open(Path(folder) / "large", options.samples)
        report["get"] = measure_get(Path(folder) / "small", options.pairs, options.block)
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure_open(folder: Path, samples: int) -> dict[str, Any]:
    """Open an index several times and read a few random samples of it; memory is the process's own (USS)."""
    prefix = write_synthetic(folder, samples, fill=False)
    process = psutil.Process()
    before = process.memory_full_info().uss
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        dataset = CurriculumDataset(prefix, verify=False)
        seconds.append(time.perf_counter() - start)
    opened = process.memory_full_info().uss
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    for i in rng.integers(len(dataset), size=200):
        dataset[int(i)]
    first_reads = (time.perf_counter() - start) / 200
    start = time.perf_counter()
    dataset.check_all()
    checked = time.perf_counter() - start
    return {
        "samples": len(dataset),
        "tokens": len(dataset) * SEQ_LENGTH,
        "documents": dataset.header.shards[0].documents,
        "seconds": seconds,
        "goal_seconds": OPEN_GOAL_SECONDS,
        "memory_mb": (opened - before) / MEGABYTE,
        "seconds_of_a_first_read": first_reads,
        "seconds_of_checking_all_records_and_batches": checked,
    }


def measure_get(folder: Path, pairs: int, block: int) -> dict[str, Any]:
    """Return the ratios ours / GPTDataset of a random read, on the same documents."""
    prefix = write_synthetic(folder, 8192, fill=True)
    ours = CurriculumDataset(prefix, verify=False)
    stock = gpt_dataset(folder)
    count = min(len(ours), len(stock))
    rng = np.random.default_rng(0)
    for i in range(count):  # the page cache is warm for both
        ours[i], stock[i]
    wall, seconds = [], []
    for pair in range(pairs):
        order = [int(i) for i in rng.integers(count, size=block)]
        first, second = (ours, stock) if pair % 2 else (stock, ours)
        times = {id(dataset): clock(dataset.__getitem__, order) for dataset in (first, second)}
        wall.append(times[id(ours)] / times[id(stock)])
        seconds.append((times[id(ours)] / block, times[id(stock)] / block))
    quarters = statistics.quantiles(wall, n=4)
    return {
        "pairs": pairs,
        "ratio": {
            "median": statistics.median(wall),
            "quartiles": [quarters[0], quarters[2]],
            "range": [min(wall), max(wall)],
        },
        "goal": GET_GOAL,
        "median_seconds": [statistics.median(side) for side in zip(*seconds, strict=True)],
    }


def clock(get: Callable[[int], Any], order: list[int]) -> float:
    """Return the seconds of reading the samples in this order."""
    start = time.perf_counter()
    for i in order:
        get(i)
    return time.perf_counter() - start


def write_synthetic(folder: Path, samples: int, *, fill: bool) -> Path:
    """Write an index of ``samples`` over one shard; without ``fill`` the .bin is a hole of the right size."""
    folder.mkdir(parents=True)
    rounds = samples // CLUSTERS
    rng = np.random.default_rng(1)
    need = rounds * SEQ_LENGTH + 1
    lengths = [_lengths(rng, need) for _ in range(CLUSTERS)]
    documents = [len(part) for part in lengths]
    everything = np.concatenate(lengths)
    total = int(everything.sum())
    prefix = folder / "shard_00000"
    write_idx(Path(f"{prefix}.idx"), everything)
    with Path(f"{prefix}.bin").open("wb") as file:
        if fill:
            file.write(rng.integers(1, VOCAB, size=total, dtype=np.uint16).tobytes())
        file.truncate(total * 2)
    blocks, start = [], 0
    for cluster, count in enumerate(documents):
        docs = np.zeros(count, dtype=DOC)
        docs["doc"] = np.arange(start, start + count)
        blocks.append(ClusterBlock(cluster, docs, lengths[cluster].astype(np.int64)))
        start += count
    shard = Shard("shard_00000", "0" * 64, "0" * 64, len(everything), total)
    write_index(
        folder / "moe", [IterationBlock(1, [shard], blocks, rounds)], kind="moe", num_domains=CLUSTERS, iterations=2,
        seq_length=SEQ_LENGTH, d_ds=[0.1], sequences_per_domain=2, rotate=True, tokenizer_sha256="0" * 64,
        vocab_size=VOCAB, eod=0,
    )  # fmt: skip
    return folder / "moe"


def _lengths(rng: np.random.Generator, need: int) -> "np.ndarray[Any, np.dtype[np.int32]]":
    """Return lengths of documents that have ``need`` tokens together, log-normal like those of the web."""
    count = int(need / MEAN_DOCUMENT * 1.2) + 64
    lengths = np.maximum(rng.lognormal(np.log(MEAN_DOCUMENT) - 0.5, 1.0, count), 1).astype(np.int32)
    ends = np.cumsum(lengths, dtype=np.int64)
    last = int(np.searchsorted(ends, need))
    if last >= count:
        return np.append(lengths, np.int32(need - ends[-1]))
    return lengths[: last + 1]


def write_idx(path: Path, lengths: "np.ndarray[Any, np.dtype[np.int32]]") -> None:
    """Write Megatron's .idx of one sequence a document; its builder would need the tokens one by one."""
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]) * 2
    with path.open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(lengths), len(lengths) + 1))
        for column in (lengths, pointers, np.arange(len(lengths) + 1, dtype=np.int64)):
            file.write(column.tobytes())


def gpt_dataset(folder: Path) -> Any:
    """Return Megatron's own dataset over the same shard, one epoch of it."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    tokenizer = SimpleNamespace(vocab_size=VOCAB, eod=0, pad=VOCAB, unique_identifiers={"class": "none"})
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=SEQ_LENGTH, blend=([str(folder / "shard_00000")], None), split="1,0,0",
        path_to_cache=str(folder / "cache"), tokenizer=tokenizer, reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False, mid_level_dataset_surplus=0.005,
    )  # fmt: skip
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [8000, 0, 0], lambda: True, config).build()
    return train


if __name__ == "__main__":
    main()

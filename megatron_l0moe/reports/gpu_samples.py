"""What `runtime/gpus.py` saw, in a few numbers for each training stage; nothing where no GPU was sampled."""

import itertools
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.reports import forms
from megatron_l0moe.runtime.json_files import parse_json

Json = dict[str, Any]

GAP = 5.0
"""Times the median distance of two samples: what is longer is a pause between two attempts, not work."""
NUMBERS = ("power", "memory", "utilization")


def read_gpu_samples(run: Path) -> Json:
    """Return the numbers of the stages `experts` (all together) and `moe`, each only if it was sampled."""
    found = {}
    for stage, pattern in (("experts", "experts/*/gpu/*.jsonl"), ("moe", "moe/gpu/*.jsonl")):
        files = sorted(run.glob(pattern))
        if files:
            found[stage] = _numbers(files)
    return found


def _numbers(files: Iterable[Path]) -> Json:
    """Put the samples of a stage together; watts, GB (1e9 bytes), percent, kWh."""
    by_gpu: dict[tuple[Path, str], list[Json]] = {}
    unreadable = 0
    for file in files:
        for line in file.read_bytes().splitlines():
            try:
                sample = parse_json(line, str(file), "")
                forms.check(sample, forms.GpuSample, file, "")
            except L0MoEError:  # a job that was killed while it wrote
                unreadable += 1
                continue
            by_gpu.setdefault((file, sample["gpu"]), []).append(sample)
    every = [sample for samples in by_gpu.values() for sample in samples]
    power, memory, utilization = (
        [float(sample[name]) for sample in every if sample.get(name) is not None] for name in NUMBERS
    )
    return {
        "gpus": len({(file.name, gpu) for file, gpu in by_gpu}),
        "samples": len(every),
        "unreadable_lines": unreadable,
        "mean_power": statistics.fmean(power) if power else None,
        "largest_power": max(power, default=None),
        "largest_memory": max(memory) / 1e9 if memory else None,
        "mean_utilization": statistics.fmean(utilization) if utilization else None,
        "energy": sum(_joules(samples) for samples in by_gpu.values()) / 3.6e6 if power else None,
    }


def _joules(samples: list[Json]) -> float:
    """Integrate one GPU's power over the time between its samples, pauses left out."""
    known = sorted((sample["time"], sample["power"]) for sample in samples if sample.get("power") is not None)
    pairs = list(itertools.pairwise(known))
    if not pairs:
        return 0.0
    longest = GAP * statistics.median(end - start for (start, _), (end, _) in pairs)
    total: float = sum(
        (end - start) * (before + after) / 2
        for (start, before), (end, after) in pairs
        if end - start <= longest
    )
    return total

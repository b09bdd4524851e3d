"""Memory and speed of the conversions, on random checkpoints: of `convert` and `export` beside a plain copy.

    python benchmarks/conversion.py [--folder DIR] [--pairs 3] [--json FILE]

Defaults: 4 layers of Llama-3-8B, 3.8 GB in 4 shards; 64 experts of 1024 channels in each of 4 layers, 6.4 GB. Every
conversion runs in a process of its own. Copy and conversion read the same files, which are in the page cache, and take
turns; before each the disk has written all that came before. Needs 20 GB of disk and removes what it wrote.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from one_conversion import memory
from synthetic import llama_config, write_dense, write_experts

from megatron_l0moe.checkpoints.rules import blocks
from megatron_l0moe.checkpoints.safetensors_files import SafetensorsFolder
from megatron_l0moe.conversion.convert import convert_dense
from megatron_l0moe.runtime.hardware import describe_machine

PROGRAM = Path(__file__).with_name("one_conversion.py")
PEAK_GOAL_MB = 1000
SPEED_GOAL = 0.5


def main() -> None:
    """Measure, print and write JSON."""
    options = _options()
    machine = describe_machine(device="cpu", threads=1)
    report: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "machine": machine}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        if "dense" in options.parts:
            report["dense"] = measure_dense(Path(name) / "dense", options)
        if "assemble" in options.parts:
            report["assemble"] = measure_assemble(Path(name) / "assemble", options)
    report["peak_of_this_process_mb"] = memory("VmHWM")
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure_dense(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Convert and export in turns with copies; return medians, peaks, and whether the bytes came back."""
    hf, out = folder / "hf", folder / "out"
    config = llama_config(layers=options.layers, hidden=options.hidden, ffn=options.ffn, vocab=options.vocab)
    size = write_dense(hf, config, max_shard_bytes=options.shard_bytes)
    runs: dict[str, list[dict[str, float]]] = {
        "copy": [],
        "convert": [],
        "recorded": [],
        "export": [],
        "copy of megatron": [],
    }
    for _ in range(options.pairs):
        runs["copy"].append(run("copy", hf, out))
        shutil.rmtree(out)
        runs["recorded"].append(run("recorded", hf, out))
        shutil.rmtree(out)
        runs["convert"].append(run("convert", hf, out))
        runs["copy of megatron"].append(run("copy", out, folder / "copy"))
        shutil.rmtree(folder / "copy")
        runs["export"].append(run("export", out / "megatron", hf, folder / "back"))
        same = same_bytes(hf, folder / "back")
        shutil.rmtree(out)
        shutil.rmtree(folder / "back")
    shards = len(list(hf.glob("*.safetensors")))
    shutil.rmtree(folder)
    return {
        "bytes": size,
        "shards": shards,
        "same_bytes": same,
        "goals": {"peak_mb": PEAK_GOAL_MB, "speed_of_a_copy": SPEED_GOAL},
        "convert": compared(runs["convert"], runs["copy"], size),
        "time_of_convert_with_sha256": [
            one["seconds"] / other["seconds"]
            for one, other in zip(runs["recorded"], runs["convert"], strict=True)
        ],
        "export": compared(runs["export"], runs["copy of megatron"], size),
    }


def compared(runs: list[dict[str, float]], copies: list[dict[str, float]], size: int) -> dict[str, Any]:
    """Return the speed as a part of the copy's, run by run, and the memory."""
    keys = ("seconds", "seconds_with_fsync")
    ratios = {key: [c[key] / r[key] for r, c in zip(runs, copies, strict=True)] for key in keys}
    return {
        "speed_of_a_copy": {key: {"median": statistics.median(v), "all": v} for key, v in ratios.items()},
        "mb_per_second": {
            who: {key: size / 1e6 / statistics.median(one[key] for one in side) for key in keys}
            for who, side in (("ours", runs), ("copy", copies))
        },
        "peak_mb": max(one["peak_mb"] for one in runs),
        "imports_mb": max(one["imports_mb"] for one in runs),
    }


def measure_assemble(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Merge experts that have weights, and experts that are lists of units; return seconds and peaks."""
    config = llama_config(
        layers=options.layers, hidden=options.hidden, ffn=options.ffn, vocab=options.small_vocab
    )
    write_dense(folder / "hf", config)
    convert_dense(folder / "hf", folder / "dense")
    shutil.rmtree(folder / "hf")
    result: dict[str, Any] = {"one_expert_mb": 3 * options.hidden * options.expert_ffn * 2 / 1e6}
    result["one_layer_mb"] = result["one_expert_mb"] * options.experts
    result["dense_mlp_mb"] = 3 * options.hidden * options.ffn * 2 / 1e6
    dense = folder / "dense" / "megatron"
    for kind in ("weights", "units"):
        write_experts(
            folder / kind, dense, count=options.experts, width=options.expert_ffn, weights=kind == "weights"
        )
        done = run("assemble", dense, folder / kind, folder / "out")
        size = sum(file.stat().st_size for file in (folder / "out").rglob("*.distcp"))
        result[f"experts with {kind}"] = {**done, "bytes": size}
        shutil.rmtree(folder / kind)
        shutil.rmtree(folder / "out")
    shutil.rmtree(folder)
    return result


def run(what: str, *paths: Path) -> dict[str, float]:
    """Run one conversion in a process of its own, with nothing left to write from before."""
    os.sync()
    command = [sys.executable, str(PROGRAM), what, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    numbers: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(what, numbers, flush=True)
    return numbers


def same_bytes(one: Path, two: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit by bit, whatever their shards."""
    a, b = SafetensorsFolder(one), SafetensorsFolder(two)
    return a.names == b.names and all(
        a.shape(name) == b.shape(name)
        and torch.equal(
            a.read(name, begin, end).view(torch.uint8), b.read(name, begin, end).view(torch.uint8)
        )
        for name in a.names
        for begin, end in blocks(a.shape(name))
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=["dense", "assemble"], choices=["dense", "assemble"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=14336)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument(
        "--small-vocab", type=int, default=8192, help="of the model that experts are merged into"
    )
    parser.add_argument("--shard-bytes", type=int, default=1_100_000_000)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--expert-ffn", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="of a disk with room; default: that of temporary files")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()

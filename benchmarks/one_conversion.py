"""Run one conversion in this process and say what it took: seconds, and memory of the imports and at the peak.

    python benchmarks/one_conversion.py convert HF OUT
    python benchmarks/one_conversion.py recorded HF OUT
    python benchmarks/one_conversion.py export MEGATRON HF OUT
    python benchmarks/one_conversion.py assemble MEGATRON EXPERTS OUT
    python benchmarks/one_conversion.py copy FOLDER OUT

`copy` is the measure for the others; `recorded` is `convert` with the sha256 of all that is read and written, as the
stage records it. --whole-tensors converts every tensor in one block. Linux only.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_l0moe.checkpoints import rules
from megatron_l0moe.conversion.convert import convert_any, weight_files
from megatron_l0moe.conversion.export import export_dense
from megatron_l0moe.experts.merging import assemble
from megatron_l0moe.runs import digests


def main() -> None:
    """Run, print one line of JSON: sizes in MB (10^6 bytes)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[*WORK])
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--whole-tensors", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.whole_tensors:
        rules.BLOCK_VALUES = 2**62
    imports = memory("VmRSS")
    start = time.perf_counter()
    WORK[options.what](*options.paths)
    written = time.perf_counter() - start
    sync(options.paths[-1])
    synced = time.perf_counter() - start
    numbers = {
        "seconds": written,
        "seconds_with_fsync": synced,
        "imports_mb": imports,
        "peak_mb": memory("VmHWM"),
    }
    print(json.dumps(numbers))


def memory(field: str) -> float:
    """Return a line of /proc/self/status in MB; VmHWM is the highest VmRSS of this process."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024 / 1e6


def sync(folder: Path) -> None:
    """Wait until all files are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _assemble(dense: Path, experts: Path, out: Path) -> object:
    return assemble(dense, sorted(experts.glob("*.safetensors")), out, top_k=2)


def _recorded(hf: Path, out: Path) -> object:
    weights = weight_files(hf)
    for file in weights:
        digests.begin(file)
    with digests.following():
        convert_any(hf, out)
    files = [*weights, *(file for file in out.rglob("*") if file.is_file())]
    return digests.of({str(file): file for file in files})


WORK: dict[str, Callable[..., object]] = {
    "convert": convert_any,
    "recorded": _recorded,
    "export": export_dense,
    "assemble": _assemble,
    "copy": shutil.copytree,
}


if __name__ == "__main__":
    main()

"""Convert, export and assemble a random model in this process; print how far memory rose above what it was before.

Usage: PYTHONPATH=ROOT:ROOT/benchmarks python peak_memory.py FOLDER
"""

import json
import multiprocessing
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from one_conversion import WORK, memory
from synthetic import llama_config, write_dense, write_experts

from megatron_l0moe.checkpoints import rules
from megatron_l0moe.checkpoints.safetensors_files import SafetensorsFolder
from megatron_l0moe.checkpoints.torch_dist import CheckpointReader
from megatron_l0moe.experts.expert_file import UNITS, WEIGHTS, ExpertFile
from megatron_l0moe.runtime.platform import keep_freed_memory

HIDDEN, FFN, VOCAB, LAYERS, EXPERTS, WIDTH = 1024, 2048, 32768, 4, 24, 512
BLOCK = 2**19
TINY = {"layers": 1, "hidden": 256, "ffn": 256, "vocab": 256}
BYTES = 2  # of a bfloat16


class Meter:
    """Peaks above the memory before; all that was measured before is done in smaller models first."""

    def __init__(self) -> None:
        self.before = memory("VmRSS")
        self.peaks: dict[str, float] = {}

    def run(self, name: str, what: str, *paths: Path) -> None:
        """Run with an output folder that is removed, unless the name is that of the work: others read it."""
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
        WORK[what](*paths)
        self.peaks[name] = (memory("VmHWM") - self.before) * 1e6
        if name != "convert":
            shutil.rmtree(paths[-1])


def elsewhere(function: Callable[..., object], *arguments: object, **settings: object) -> None:
    """Call in a process that ends, so that this one does not keep its memory."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments, kwargs=settings)
    process.start()
    process.join()
    assert process.exitcode == 0


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    rules.BLOCK_VALUES = BLOCK
    keep_freed_memory()
    elsewhere(write_dense, folder / "tiny", llama_config(**TINY))
    WORK["convert"](folder / "tiny", folder / "tiny_dense")
    WORK["export"](folder / "tiny_dense/megatron", folder / "tiny", folder / "tiny_back")
    elsewhere(write_experts, folder / "tiny_experts", folder / "tiny_dense/megatron", count=2, width=8)
    WORK["assemble"](folder / "tiny_dense/megatron", folder / "tiny_experts", folder / "tiny_moe")

    hf, dense = folder / "hf", folder / "dense/megatron"
    config = llama_config(layers=LAYERS, hidden=HIDDEN, ffn=FFN, vocab=VOCAB)
    elsewhere(write_dense, hf, config, max_shard_bytes=5 * 10**7)
    meter = Meter()
    meter.run("convert", "convert", hf, folder / "dense")
    meter.run("export", "export", dense, hf, folder / "back")
    for kind in ("weights", "units"):
        elsewhere(write_experts, folder / kind, dense, count=EXPERTS, width=WIDTH, weights=kind == "weights")
        meter.run(f"assemble, {kind}", "assemble", dense, folder / kind, folder / "moe")

    source, reader = SafetensorsFolder(hf), CheckpointReader(dense)
    for what, paths, load in (
        ("convert", (hf,), lambda: [source.read(name) for name in source.names]),
        ("export", (dense, hf), lambda: [reader.read(name) for name in reader.shapes]),
    ):
        rules.BLOCK_VALUES = 2**40
        meter.run(f"{what}, whole tensors", what, *paths, folder / "out")
        rules.BLOCK_VALUES = BLOCK
        everything = load()
        meter.run(f"{what}, whole model", what, *paths, folder / "out")
        del everything
    files = [ExpertFile(file) for file in sorted((folder / "weights").iterdir())]
    held = [file.read(LAYERS - 1, part) for file in files for part in UNITS + WEIGHTS]
    meter.run("assemble, a layer read first", "assemble", dense, folder / "weights", folder / "moe")
    del held

    expert = 3 * HIDDEN * WIDTH * BYTES
    sizes = {
        "files": len(list(hf.glob("*.safetensors"))),
        "model": sum(file.stat().st_size for file in hf.glob("*.safetensors")),
        "largest tensor": VOCAB * HIDDEN * BYTES,
        "block": BLOCK * BYTES,
        "expert": expert,
        "experts of a layer": expert * EXPERTS,
        "dense mlp": 3 * HIDDEN * FFN * BYTES,
    }
    print(json.dumps({**sizes, **meter.peaks}))


if __name__ == "__main__":
    main()

"""What our modules cost beside Megatron's own of the same shape: time and memory, as ratios with their spread.

    python benchmarks/training_cost.py [--dtype bf16] [--tokens 2048] [--json FILE]

Both sides of a comparison run in one process, in turns (stock, ours, ours, stock, ...) and on the same inputs; each
pair gives one ratio, so that a machine that slows down slows both. Every pair has new inputs: the experts' row counts
then change from step to step, as they do in training. It needs no data and no checkpoint, and one GPU or none.
"""

import argparse
import dataclasses
import json
import logging
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_l0moe.runtime import cpu
from megatron_l0moe.runtime.hardware import describe_machine

if TYPE_CHECKING:
    from subjects import Comparison, Shape, Subject


def main() -> None:
    """Measure, print a line for each comparison, write JSON."""
    cpu.install_training()
    from subjects import Shape, comparisons  # imports Megatron, which needs the runtime first

    logging.disable(logging.WARNING)
    options = _options(Shape)
    shape = Shape(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Shape)})
    torch.set_num_threads(options.threads)
    machine = describe_machine(device=str(cpu.device()), threads=torch.get_num_threads())
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine,
        "shape": dataclasses.asdict(shape),
        "results": [],
    }
    print(json.dumps(report, indent=2))
    with cpu.one_process_group():
        for comparison in comparisons(shape):
            if options.only in comparison.name:
                report["results"].append(measure(comparison, options.pairs, options.warmup))
                print(line(report["results"][-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(comparison: "Comparison", pairs: int, warmup: int) -> dict[str, Any]:
    """Return the ratios ours / stock of one comparison: time for every pair, memory once."""
    ours, stock = comparison.ours(), comparison.stock()
    wall, processor, seconds = [], [], []
    for step in range(warmup + pairs):
        for subject in (ours, stock):
            subject.prepare(step)
        first, second = (ours, stock) if step % 2 else (stock, ours)
        times = {id(subject): _time(subject) for subject in (first, second)}
        if step >= warmup:
            (ours_wall, ours_processor), (stock_wall, stock_processor) = times[id(ours)], times[id(stock)]
            wall.append(ours_wall / stock_wall)
            processor.append(ours_processor / stock_processor)
            seconds.append((ours_wall, stock_wall))
    saved, peak, state = zip(*(_memory(subject, warmup + pairs) for subject in (ours, stock)), strict=True)
    return {
        "name": comparison.name,
        "goal": comparison.goal,
        "pairs": pairs,
        "time": _spread(wall),
        "processor_time": _spread(processor),
        "median_seconds": [statistics.median(side) for side in zip(*seconds, strict=True)],
        "saved_activations": _ratio(*saved),
        "peak_memory": _ratio(*peak),
        "state": _ratio(*state),
    }


def line(result: dict[str, Any]) -> str:
    """Return a result as text."""
    memory = [
        f"{words} {result[key]['ratio']:.4f} ({result[key]['ours'] / 2**20:.2f} MiB)"
        for key, words in (
            ("saved_activations", "saved activations"),
            ("peak_memory", "peak"),
            ("state", "state"),
        )
        if result[key] is not None
    ]
    goal = "no goal" if result["goal"] is None else f"goal {result['goal']}"
    ours, stock = result["median_seconds"]
    return (
        f"{result['name']} ({goal}; {1e3 * ours:.1f} ms, stock {1e3 * stock:.1f} ms, {result['pairs']} pairs)\n"
        f"    time      {_words(result['time'])}\n"
        f"    processor {_words(result['processor_time'])}\n"
        f"    memory    {', '.join(memory)}"
    )


def _time(subject: "Subject") -> tuple[float, float]:
    """Return wall and processor seconds of one step."""
    torch.cuda.synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    subject.run()
    torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def _memory(subject: "Subject", step: int) -> tuple[int, int, int]:
    """Return bytes: saved for the backward pass, the device's peak beyond the state in one step, the state."""
    subject.prepare(step)
    saved = _saved_bytes(subject)
    subject.prepare(step)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    subject.run()
    torch.cuda.synchronize()
    return saved, int(torch.cuda.max_memory_allocated() - before), subject.state_bytes()


def _saved_bytes(subject: "Subject") -> int:
    """Return the bytes that autograd keeps for the backward pass, each storage once, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in subject.module.parameters()}
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = subject.forward()
    output.backward(subject.gradient)
    return sum(found.values())


def _ratio(ours: int, stock: int) -> dict[str, float] | None:
    """Return both numbers and their ratio; None where the device does not count."""
    return {"ours": ours, "stock": stock, "ratio": ours / stock} if stock else None


def _spread(ratios: list[float]) -> dict[str, float]:
    lower, _, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "median": statistics.median(ratios),
        "lower_quartile": lower,
        "upper_quartile": upper,
        "min": min(ratios),
        "max": max(ratios),
    }


def _words(spread: dict[str, float]) -> str:
    quartiles = f"{spread['lower_quartile']:.3f} to {spread['upper_quartile']:.3f}"
    return f"{spread['median']:.3f} (quartiles {quartiles}; range {spread['min']:.3f} to {spread['max']:.3f})"


def _options(shape: "type[Shape]") -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=31, help="timed pairs of each comparison, at least 2")
    parser.add_argument("--warmup", type=int, default=4, help="pairs before the clock starts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--only", default="", help="measure the comparisons whose names hold this text")
    parser.add_argument("--json", type=Path, help="file to write the report to")
    for field in dataclasses.fields(shape):
        kind: Any = {"choices": ("fp32", "bf16")} if field.name == "dtype" else {"type": int}
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", default=field.default, help="of the model", **kind
        )
    return parser.parse_args()


if __name__ == "__main__":
    main()

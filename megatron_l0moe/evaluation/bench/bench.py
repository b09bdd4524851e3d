"""`l0moe bench`: a dense model and its L0-MoE timed in pairs, by transformers and by vLLM, beside their bounds.

| mode | what is timed |
|---|---|
| `prefill` | several prompts in one pass, logits of the last positions only |
| `first_token` | one prompt until its first token |
| `decode_bB` | steps of B sequences, each after a short prompt |

The result is one JSON object, and a table with one row for each engine and mode.

Legend: B sequences that run together.
"""

import logging
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rich.table import Table

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.evaluation.bench.vllm_runner import SERVE_PYTHON, VllmRunner
from megatron_l0moe.evaluation.evaluate import checkpoint_counts
from megatron_l0moe.evaluation.loads import DistinctExperts
from megatron_l0moe.evaluation.models import EXPERTS_IMPLEMENTATION, load_model
from megatron_l0moe.evaluation.timing import (
    THREADS,
    WARM_UP_PAIRS,
    Mode,
    Operations,
    Runner,
    TransformersRunner,
    pinned_threads,
    profile_transformers,
    time_pairs,
    timings,
    windows,
)
from megatron_l0moe.index.heldout_file import read_heldout
from megatron_l0moe.runtime.cpu import device
from megatron_l0moe.runtime.hardware import describe_machine, energy_meter
from megatron_l0moe.sizes.architecture import read_config
from megatron_l0moe.sizes.parameters import ParameterCounts, pass_bounds

logger = logging.getLogger(__name__)

HEADER = (
    "engine",
    "mode",
    "dense, ms",
    "L0-MoE, ms",
    "dense / L0-MoE",
    "bound: active",
    "bound: bytes",
    "experts read",
)
LEGEND = (
    "ms: median of a pass (decode: of one step). dense / L0-MoE: median and quartiles of the pairs' ratios; above 1 "
    "the L0-MoE is faster. Bounds: ratio of multiplications, and of weights read once. Experts read: distinct experts "
    "of a layer in one pass under uniform routing; in brackets with the routing that was measured."
)


def rows(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of each row."""
    for engine, measured in result["engines"].items():
        for name, mode in measured["modes"].items():
            passes = mode["tokens"] if name.startswith("decode") else 1
            ratio, bounds, experts = mode["ratio"], mode["bounds"], mode["distinct_experts"]
            bytes_read = f"{bounds['bytes']:.2f}"
            if "bytes_measured_routing" in bounds:
                bytes_read += f" ({bounds['bytes_measured_routing']:.2f})"
            distinct = f"{experts['uniform']:.1f}"
            if "measured" in experts:
                distinct += f" ({experts['measured']:.1f})"
            yield (
                engine,
                name,
                _milliseconds(mode["dense"], passes),
                _milliseconds(mode["l0moe"], passes),
                f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]",
                f"{bounds['active']:.2f}",
                bytes_read,
                distinct,
            )


def rich_table(result: Mapping[str, Any]) -> Table:
    """Return the table for a terminal."""
    table = Table(caption=f"{_machine(result)}. {LEGEND}", caption_justify="left")
    for place, title in enumerate(HEADER):
        table.add_column(title, justify="right" if place > 1 else "left")
    for row in rows(result):
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    return table


def markdown(result: Mapping[str, Any]) -> str:
    """Return the table and, if there are any, the profiles as Markdown."""
    lines = [_line(HEADER), _line(["---"] * 2 + ["---:"] * (len(HEADER) - 2)), *map(_line, rows(result))]
    lines += ["", f"{_machine(result)}. {LEGEND}"]
    for engine, measured in result["engines"].items():
        for mode, models in measured.get("profiles", {}).items():
            for model, profile in models.items():
                shares = ", ".join(f"{name} {share:.0%}" for name, share in profile["shares"].items())
                lines += [
                    "",
                    f"{engine}, {mode}, {model}: {profile['seconds']:.2f} s of operations: {shares}.",
                ]
    return "\n".join(lines) + "\n"


def _milliseconds(model: Mapping[str, Any], passes: int) -> str:
    cell = f"{1000 * model['seconds']['median'] / passes:.1f}"
    if "joules_per_token" in model:
        cell += f", {model['joules_per_token']['median']:.3g} J/token"
    return cell


def _machine(result: Mapping[str, Any]) -> str:
    hardware, settings = result["hardware"], result["settings"]
    engines = [
        f"{engine} ({', '.join(f'{name} {number}' for name, number in measured['versions'].items())})"
        for engine, measured in result["engines"].items()
    ]
    return (
        f"{hardware['cpu']}, {hardware['device']}, {hardware['threads']} thread(s), {settings['dtype']}, "
        f"{settings['repeats']} pairs; {'; '.join(engines)}"
    )


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


Engine = Literal["transformers", "vllm"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
BATCHES = (1, 8, 64)


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What is timed and how often."""

    engines: tuple[Engine, ...] = ENGINES
    dtype: str = "float32"
    threads: int = THREADS
    repeats: int = 5
    """Pairs that count; one more warms up."""
    prompt_tokens: int = 512
    """The length of the prompts of `prefill` and `first_token`."""
    prefill_batch: int = 4
    """The number of prompts of `prefill`."""
    decode_prompt_tokens: int = 16
    """Before each decode, untimed; short, so that the KV cache hardly counts."""
    decode_tokens: int = 8
    """Steps of each decode."""
    batches: tuple[int, ...] = BATCHES
    profile: bool = False
    """Whether one prefill and one decode of each model run under torch's profiler, after the timing."""
    serve_python: Path = SERVE_PYTHON
    """Python of the environment that has vLLM."""

    def modes(self) -> tuple[Mode, ...]:
        """Return the modes in the order in which they are timed."""
        tokens = self.prompt_tokens
        decode = [
            Mode(
                name=f"decode_b{batch}",
                batch=batch,
                tokens=self.decode_tokens,
                prompt=self.decode_prompt_tokens,
            )
            for batch in self.batches
        ]
        return (
            Mode(name="prefill", batch=self.prefill_batch, tokens=tokens, prompt=0, last_logits=True),
            Mode(name="first_token", batch=1, tokens=tokens, prompt=0, last_logits=True),
            *decode,
        )


@dataclass
class _Opened:
    """Both models in one engine."""

    dense: Runner
    moe: Runner
    versions: dict[str, str]
    distinct_experts: Callable[[Mode, Sequence[int]], float] | None
    """Measures a decode's distinct experts; None: the engine does not show its routing."""
    profile: Callable[[Runner, Mode, Sequence[int]], Operations]
    notes: dict[str, object]


def bench(dense: Path, moe: Path, text: Sequence[int], settings: BenchSettings) -> dict[str, object]:
    """Time two checkpoint folders.

    Args:
        dense: Hugging Face checkpoint of the dense model.
        moe: of the L0-MoE made of it.
        text: token ids that prompts are cut from.
        settings: modes, engines, repeats.

    Returns:
        What bench.json holds: models, settings, hardware, and for each engine and mode times, ratio and bounds.

    Raises:
        L0MoEError: an engine that is not there or failed, too little text, a checkpoint that does not load.
    """
    counts = checkpoint_counts(dense), checkpoint_counts(moe)
    engines: dict[str, object] = {}
    for engine in settings.engines:
        logger.info("loading both models in %s", engine)
        with _OPENERS[engine](dense, moe, settings) as opened:
            engines[engine] = _measure(opened, counts, text, settings)
    return {
        "models": {"dense": _sizes(counts[0]), "l0moe": _sizes(counts[1])},
        "engines": engines,
        "settings": {
            "dtype": settings.dtype,
            "repeats": settings.repeats,
            "warm_up_pairs": WARM_UP_PAIRS,
            "decode_prompt_tokens": settings.decode_prompt_tokens,
            "prompt_tokens": settings.prompt_tokens,
            "prefill_logits": "last positions",
        },
        "hardware": describe_machine(device=str(device()), threads=settings.threads),
    }


def _measure(
    opened: _Opened,
    counts: tuple[ParameterCounts, ParameterCounts],
    text: Sequence[int],
    settings: BenchSettings,
) -> dict[str, object]:
    modes: dict[str, object] = {}
    for mode in settings.modes():
        pairs = time_pairs(opened.dense, opened.moe, text, mode, settings.repeats)
        measured = None
        if opened.distinct_experts is not None and mode.is_decode:
            measured = opened.distinct_experts(mode, text)
        modes[mode.name] = timings(mode, pairs) | _bounds(mode, counts, measured)
    profiles = {}
    if settings.profile:
        for mode in settings.modes():
            if mode.name == "prefill" or mode.is_decode:
                runners = {"dense": opened.dense, "l0moe": opened.moe}
                profiles[mode.name] = {
                    name: opened.profile(runner, mode, text).to_json() for name, runner in runners.items()
                }
    return {
        "modes": modes,
        "versions": opened.versions,
        **opened.notes,
        **({"profiles": profiles} if profiles else {}),
    }


def _bounds(
    mode: Mode, counts: tuple[ParameterCounts, ParameterCounts], measured: float | None
) -> dict[str, object]:
    """Return what parameters and bytes allow, with the distinct experts of a pass, expected and, if known, measured."""
    tokens, logits = mode.pass_tokens, mode.pass_logits
    uniform = pass_bounds(*counts, tokens=tokens, logits=logits)
    experts = {"uniform": counts[1].distinct_experts(tokens)}
    bounds = {"active": uniform.active, "bytes": uniform.bytes_read}
    if measured is not None:
        experts["measured"] = measured
        routed = pass_bounds(*counts, tokens=tokens, logits=logits, distinct_experts=measured)
        bounds["bytes_measured_routing"] = routed.bytes_read
    return {"bounds": bounds, "distinct_experts": experts}


@contextmanager
def _transformers(dense: Path, moe: Path, settings: BenchSettings) -> Iterator[_Opened]:
    import torch
    import transformers

    models = [load_model(folder, dtype=settings.dtype, device=device()) for folder in (dense, moe)]
    meter = energy_meter()
    runners = [TransformersRunner(model, meter) for model in models]

    def distinct(mode: Mode, text: Sequence[int]) -> float:
        with DistinctExperts(models[1], ignore_passes=1) as experts:
            runners[1](windows(text, mode, 0, settings.repeats), mode)
        return experts.mean()

    def profile(runner: Runner, mode: Mode, text: Sequence[int]) -> Operations:
        return profile_transformers(lambda: runner(windows(text, mode, 0, settings.repeats), mode))

    with pinned_threads(settings.threads):
        yield _Opened(
            dense=runners[0],
            moe=runners[1],
            versions={"transformers": transformers.__version__, "torch": torch.__version__},
            distinct_experts=distinct,
            profile=profile,
            notes={"experts_implementation": EXPERTS_IMPLEMENTATION, "decode_input": "text"},
        )


@contextmanager
def _vllm(dense: Path, moe: Path, settings: BenchSettings) -> Iterator[_Opened]:
    modes = settings.modes()
    arguments: dict[str, Any] = {
        "dtype": settings.dtype,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_model_len": max(mode.prompt + mode.tokens for mode in modes) + 1,
        "max_num_seqs": max(mode.batch for mode in modes),
        # All prompts of a mode in one pass.
        "max_num_batched_tokens": max(mode.batch * (mode.prompt or mode.tokens) for mode in modes),
    }

    def profile(runner: Runner, mode: Mode, text: Sequence[int]) -> Operations:
        assert isinstance(runner, VllmRunner)
        return Operations.of(runner.profile(windows(text, mode, 0, settings.repeats), mode))

    meter = energy_meter()
    with tempfile.TemporaryDirectory(prefix="l0moe-bench-") as folder, ExitStack() as stack:
        runners = [
            stack.enter_context(
                VllmRunner(
                    path,
                    settings=arguments,
                    python=settings.serve_python,
                    threads=settings.threads,
                    log=Path(folder) / f"{name}.log",
                    energy=meter,
                )
            )
            for name, path in (("dense", dense), ("l0moe", moe))
        ]
        yield _Opened(
            dense=runners[0],
            moe=runners[1],
            versions=runners[1].versions,
            distinct_experts=None,
            profile=profile,
            notes={"decode_input": "own samples", "settings": arguments},
        )


_OPENERS = {"transformers": _transformers, "vllm": _vllm}


def text_for(dense: Path, heldout: Path | None, settings: BenchSettings) -> list[int]:
    """Return the token ids that prompts are cut from: held-out text, or as many random ids as the modes need."""
    if heldout is not None:
        return [token for sequence in read_heldout(heldout) for token in sequence.tokens]
    counts = read_config(dense)
    rows = settings.repeats * max(mode.batch * (mode.prompt + mode.tokens) for mode in settings.modes())
    draw = random.Random(0)  # noqa: S311
    return [draw.randrange(counts["vocab_size"]) for _ in range(rows)]


def parse_engine(name: str) -> Engine:
    """Return the engine of that name."""
    for engine in ENGINES:
        if engine == name:
            return engine
    raise L0MoEError(f"--engine {name!r} is not known; use {' or '.join(ENGINES)}.")


def _sizes(counts: ParameterCounts) -> dict[str, float]:
    return {
        "parameters": counts.total,
        "active": counts.active,
        "experts": counts.num_experts,
        "top_k": counts.top_k,
    }

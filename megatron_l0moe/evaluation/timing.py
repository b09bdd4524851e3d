"""Two models timed in pairs, whatever engine runs them; and where the time of one run goes, by torch's profiler.

Protocol: the two models run in pairs, next to each other in time and on the same text; the order inside a pair
alternates. A drift of the machine then hits both alike. One pair more than asked for warms up.

The evaluate stage's speed test runs them in one process. Text is real held-out text and decoding is fed with it (not
with the models' own output), so that both models see the same tokens and the router sees what it was trained for.
Prefill computes the logits of every position, as a plain forward call does, for both models. `bench.py` measures more.

Legend: B sequences that run together.
"""

import logging
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.index.heldout_file import HeldoutSequence
from megatron_l0moe.runtime.hardware import describe_machine
from megatron_l0moe.sizes.parameters import ParameterCounts, speed_bounds

logger = logging.getLogger(__name__)

SHOWN = 8


@dataclass(frozen=True)
class Operations:
    """Own CPU seconds of each operation, the longest first."""

    seconds: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, seconds: Iterable[tuple[str, float]]) -> "Operations":
        """Sort."""
        return cls(tuple(sorted(seconds, key=lambda item: -item[1])))

    def shares(self, shown: int = SHOWN) -> dict[str, float]:
        """Return the shares of the longest operations, and of all others together."""
        total = sum(seconds for _, seconds in self.seconds) or 1.0
        shares = {name: seconds / total for name, seconds in self.seconds[:shown]}
        return {**shares, "others": max(0.0, 1.0 - sum(shares.values()))}

    def to_json(self) -> dict[str, object]:
        """Return total and shares as plain dicts."""
        return {"seconds": sum(seconds for _, seconds in self.seconds), "shares": self.shares()}


def profile_transformers(run: Callable[[], object]) -> Operations:
    """Run once under the profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else each start and stop is a line on the terminal
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return Operations.of((event.key, event.self_cpu_time_total / 1e6) for event in profiler.key_averages())


WARM_UP_PAIRS = 1
THREADS = 1
"""One thread: on shared machines the barriers of small multi-threaded matrix products measure the neighbours."""

Windows = Sequence[Sequence[int]]
"""B rows of prompt + tokens ids each."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and spread of repeated measurements; quartiles by the inclusive method."""

    median: float
    min: float
    max: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise one or more values."""
        several = list(values) if len(values) > 1 else [*values, *values]
        quartiles = statistics.quantiles(several, n=4, method="inclusive")
        return cls(
            median=statistics.median(values),
            min=min(values),
            max=max(values),
            q1=quartiles[0],
            q3=quartiles[2],
        )

    @property
    def iqr(self) -> float:
        """Third minus first quartile; 0 for one repeat."""
        return self.q3 - self.q1

    def to_json(self) -> dict[str, float]:
        """Return a plain dict."""
        return {
            "median": self.median,
            "min": self.min,
            "max": self.max,
            "q1": self.q1,
            "q3": self.q3,
            "iqr": self.iqr,
        }


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One way of running the models."""

    name: str
    batch: int
    tokens: int
    """Tokens that are timed, of each sequence."""
    prompt: int
    """Tokens that fill the cache before, untimed."""
    last_logits: bool = False
    """Whether a prefill computes the logits of the last position only, as a server does, and not of all."""

    @property
    def is_decode(self) -> bool:
        """Whether tokens are timed one after the other."""
        return bool(self.prompt)

    @property
    def pass_tokens(self) -> int:
        """Tokens that go through the model together in one timed pass."""
        return self.batch if self.is_decode else self.batch * self.tokens

    @property
    def pass_logits(self) -> int:
        """Positions of one timed pass whose logits are computed."""
        return self.batch if self.is_decode or self.last_logits else self.batch * self.tokens


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One measurement."""

    seconds: float
    """Wall clock."""
    joules: float | None = None
    """Energy of the GPU in that time; None without one that tells."""


class Runner(Protocol):
    """One model in one engine."""

    def __call__(self, tokens: Windows, mode: Mode) -> Sample:
        """Run the mode once on B rows of `mode.prompt + mode.tokens` ids."""


Pair = tuple[Sample, Sample]
"""Dense and L0-MoE."""
EnergyMeter = Callable[[], float]
"""Joules since some moment in the past."""


def time_pairs(dense: Runner, moe: Runner, text: Sequence[int], mode: Mode, repeats: int) -> list[Pair]:
    """Return `repeats` pairs of measurements, the warm-up pair left out."""
    pairs = []
    for pair in range(-WARM_UP_PAIRS, repeats):
        tokens = windows(text, mode, max(pair, 0), repeats)
        if pair % 2:
            of_moe = moe(tokens, mode)
            of_dense = dense(tokens, mode)
        else:
            of_dense = dense(tokens, mode)
            of_moe = moe(tokens, mode)
        if pair >= 0:
            pairs.append((of_dense, of_moe))
            logger.info("speed: %s %d/%d", mode.name, pair + 1, repeats)
    return pairs


def ratios(pairs: Sequence[Pair]) -> list[float]:
    """Return dense time over L0-MoE time of each pair: above 1 the L0-MoE is faster."""
    return [dense.seconds / moe.seconds for dense, moe in pairs]


def windows(text: Sequence[int], mode: Mode, pair: int, repeats: int) -> list[list[int]]:
    """Return the pair's `batch` windows of prompt + tokens ids, spread evenly over the text and all different.

    Raises:
        L0MoEError: the text is shorter than the windows of one pair.
    """
    length, rows = mode.prompt + mode.tokens, mode.batch
    if len(text) < length * rows:
        raise L0MoEError(
            f"The held-out text has {len(text)} tokens and {mode.name} needs {length * rows}; raise "
            "data.heldout_tokens_per_domain or lower evaluation.prefill_tokens and evaluation.decode_tokens."
        )
    places = rows * repeats
    room = len(text) - length
    starts = [room * (row * repeats + pair) // max(places - 1, 1) for row in range(rows)]
    return [list(text[start : start + length]) for start in starts]


@contextmanager
def pinned_threads(threads: int) -> Iterator[None]:
    """Run torch with this many threads, then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class TransformersRunner:
    """A model of transformers. Decoding is fed with the text, not with the model's own output."""

    model: PreTrainedModel
    energy: EnergyMeter | None = None

    @torch.inference_mode()
    def __call__(self, tokens: Windows, mode: Mode) -> Sample:
        """Run the mode once."""
        ids = torch.tensor(tokens, device=self.model.device)
        return self._decode(ids, mode) if mode.is_decode else self._prefill(ids, mode)

    def _prefill(self, ids: Tensor, mode: Mode) -> Sample:
        keep = {"logits_to_keep": 1} if mode.last_logits else {}
        watch = Stopwatch(self.energy)
        logits = self.model(input_ids=ids, use_cache=True, **keep).logits
        float(logits[-1, -1, 0])  # reading a value waits for the device
        return watch.stop()

    def _decode(self, ids: Tensor, mode: Mode) -> Sample:
        output = self.model(input_ids=ids[:, : mode.prompt], use_cache=True, logits_to_keep=1)
        float(output.logits[-1, -1, 0])
        watch = Stopwatch(self.energy)
        for position in range(mode.prompt, mode.prompt + mode.tokens):
            output = self.model(
                input_ids=ids[:, position : position + 1],
                past_key_values=output.past_key_values,
                use_cache=True,
            )
        float(output.logits[-1, -1, 0])
        return watch.stop()


class Stopwatch:
    """Seconds, and joules if there is a meter, from its making to `stop`."""

    def __init__(self, energy: EnergyMeter | None = None) -> None:
        self._energy = energy
        self._joules = energy() if energy else 0.0
        self._start = time.perf_counter()

    def stop(self) -> Sample:
        """Return what has passed."""
        seconds = time.perf_counter() - self._start
        return Sample(seconds=seconds, joules=self._energy() - self._joules if self._energy else None)


PROMPT_TOKENS = 32
BATCH = 8


def measure_speed(
    dense: PreTrainedModel,
    moe: PreTrainedModel,
    sequences: Sequence[HeldoutSequence],
    *,
    counts: tuple[ParameterCounts, ParameterCounts],
    prefill_tokens: int,
    decode_tokens: int,
    repeats: int,
    threads: int = THREADS,
    name: str = "l0moe",
) -> dict[str, object]:
    """Time prefill, decode at batch 1 and decode at batch 8; times are seconds of wall clock.

    Args:
        counts: parameter counts of `dense` and `moe`, for the bounds.
        prefill_tokens: length of the prefilled text, batch 1.
        decode_tokens: steps that are timed after a prompt of 32 tokens.
        repeats: pairs that count; one more pair warms up.
        name: the recipe's method, under which the second model's numbers stand.

    Returns:
        the content of evaluate/speed.json.
    """
    modes = (
        Mode(name="prefill", batch=1, tokens=prefill_tokens, prompt=0),
        Mode(name="decode_b1", batch=1, tokens=decode_tokens, prompt=PROMPT_TOKENS),
        Mode(name=f"decode_b{BATCH}", batch=BATCH, tokens=decode_tokens, prompt=PROMPT_TOKENS),
    )
    text = [token for sequence in sequences for token in sequence.tokens]
    bounds = speed_bounds(*counts, batch=BATCH)
    runners = TransformersRunner(dense), TransformersRunner(moe)
    with pinned_threads(threads):
        pairs = {mode.name: time_pairs(*runners, text, mode, repeats) for mode in modes}
    details = {
        mode.name: {**timings(mode, pairs[mode.name], name), "bound": getattr(bounds, mode.name)}
        for mode in modes
    }
    return {
        **{f"{mode}_ratio": statistics.median(ratios(pairs[mode])) for mode in pairs},
        "bounds": {mode.name: getattr(bounds, mode.name) for mode in modes},
        "details": details,
        "settings": {
            "dtype": str(dense.dtype).removeprefix("torch."),
            "experts_implementation": moe.config._experts_implementation,
            "attention_implementation": moe.config._attn_implementation,
            "repeats": repeats,
            "warm_up_pairs": WARM_UP_PAIRS,
            "prompt_tokens": PROMPT_TOKENS,
            "prefill_logits": "all positions",
            "decode_input": "held-out text, the same for both models",
        },
        "hardware": describe_machine(device=str(moe.device), threads=threads),
    }


def timings(mode: Mode, pairs: Sequence[Pair], name: str = "l0moe") -> dict[str, object]:
    """Return times and speeds of both models and the ratio, with their spreads, as plain dicts."""
    each = ratios(pairs)
    return {
        "batch": mode.batch,
        "tokens": mode.tokens,
        "dense": _model_timings(mode, [dense for dense, _ in pairs]),
        name: _model_timings(mode, [moe for _, moe in pairs]),
        "ratio": Spread.of(each).to_json() | {"pairs": each},
    }


def _model_timings(mode: Mode, samples: Sequence[Sample]) -> dict[str, object]:
    tokens = mode.batch * mode.tokens
    seconds = Spread.of([sample.seconds for sample in samples])
    result: dict[str, object] = {
        "seconds": seconds.to_json(),
        "tokens_per_second": tokens / seconds.median,
    }
    joules = [sample.joules / tokens for sample in samples if sample.joules is not None]
    if joules:
        result["joules_per_token"] = Spread.of(joules).to_json()
    return result

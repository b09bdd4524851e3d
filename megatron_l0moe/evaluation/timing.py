"""Timing of two models in pairs, whatever engine runs them.

Legend: B sequences that run together.

Protocol: the two models run in pairs, next to each other in time and on the same text; the order inside a pair
alternates. A drift of the machine then hits both alike. One pair more than asked for warms up.
"""

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_l0moe.errors import L0MoEError

logger = logging.getLogger(__name__)

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

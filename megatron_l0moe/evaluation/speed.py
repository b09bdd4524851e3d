"""Speed of a dense model and its L0-MoE, side by side in one process.

Legend: B sequences decoded together.

Protocol: the two models run in pairs, next to each other in time and on the same text; the order inside a pair
alternates. A drift of the machine then hits both alike. The ratio is the median of the pairs' ratios, dense time
over L0-MoE time: above 1 the L0-MoE is faster. Text is real held-out text and decoding is fed with it (not with
the models' own output), so that both models see the same tokens and the router sees what it was trained for.
Prefill computes the logits of every position, as a plain forward call does, for both models.
"""

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.evaluation.hardware import describe_machine
from megatron_l0moe.evaluation.heldout import HeldoutSequence
from megatron_l0moe.planning.parameters import ParameterCounts, speed_bounds

logger = logging.getLogger(__name__)

PROMPT_TOKENS = 32
BATCH = 8
WARM_UP_PAIRS = 1
THREADS = 1
"""One thread: on shared machines the barriers of small multi-threaded matrix products measure the neighbours."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and spread of repeated measurements."""

    median: float
    min: float
    max: float
    iqr: float
    """Third minus first quartile (inclusive method); 0 for one repeat."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise one or more values."""
        quartiles = (
            statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [0.0, 0.0, 0.0]
        )
        return cls(
            median=statistics.median(values),
            min=min(values),
            max=max(values),
            iqr=quartiles[2] - quartiles[0],
        )

    def to_json(self) -> dict[str, float]:
        """Return a plain dict."""
        return {"median": self.median, "min": self.min, "max": self.max, "iqr": self.iqr}


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One way of running the models."""

    name: str
    batch: int
    tokens: int
    """Tokens that are timed, of each sequence."""
    prompt: int
    """Tokens that fill the cache before, untimed."""


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
) -> dict[str, object]:
    """Time prefill, decode at batch 1 and decode at batch 8; times are seconds of wall clock.

    Args:
        counts: parameter counts of `dense` and `moe`, for the bounds.
        prefill_tokens: length of the prefilled text, batch 1.
        decode_tokens: steps that are timed after a prompt of 32 tokens.
        repeats: pairs that count; one more pair warms up.

    Returns:
        the content of evaluate/speed.json.

    Raises:
        L0MoEError: too little held-out text for these lengths.
    """
    modes = (
        Mode(name="prefill", batch=1, tokens=prefill_tokens, prompt=0),
        Mode(name="decode_b1", batch=1, tokens=decode_tokens, prompt=PROMPT_TOKENS),
        Mode(name=f"decode_b{BATCH}", batch=BATCH, tokens=decode_tokens, prompt=PROMPT_TOKENS),
    )
    text = [token for sequence in sequences for token in sequence.tokens]
    bounds = speed_bounds(*counts, batch=BATCH)
    with pinned_threads(threads):
        pairs = {mode.name: time_pairs(dense, moe, text, mode, repeats) for mode in modes}
    details = {mode.name: _details(mode, pairs[mode.name], getattr(bounds, mode.name)) for mode in modes}
    return {
        **{f"{name}_ratio": statistics.median(a / b for a, b in pairs[name]) for name in pairs},
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


@torch.inference_mode()
def time_pairs(
    dense: PreTrainedModel, moe: PreTrainedModel, text: Sequence[int], mode: Mode, repeats: int
) -> list[tuple[float, float]]:
    """Return `repeats` pairs (dense seconds, L0-MoE seconds), the warm-up pair left out."""
    run: Callable[[PreTrainedModel, Tensor, Mode], float] = (
        _decode_seconds if mode.prompt else _prefill_seconds
    )
    pairs = []
    for pair in range(-WARM_UP_PAIRS, repeats):
        tokens = torch.tensor(windows(text, mode, max(pair, 0), repeats), device=dense.device)
        if pair % 2:
            moe_seconds = run(moe, tokens, mode)
            dense_seconds = run(dense, tokens, mode)
        else:
            dense_seconds = run(dense, tokens, mode)
            moe_seconds = run(moe, tokens, mode)
        if pair >= 0:
            pairs.append((dense_seconds, moe_seconds))
            logger.info("speed: %s %d/%d", mode.name, pair + 1, repeats)
    return pairs


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


def _prefill_seconds(model: PreTrainedModel, tokens: Tensor, mode: Mode) -> float:
    start = time.perf_counter()
    logits = model(input_ids=tokens, use_cache=True).logits
    float(logits[-1, -1, 0])  # reading a value waits for the device
    return time.perf_counter() - start


def _decode_seconds(model: PreTrainedModel, tokens: Tensor, mode: Mode) -> float:
    output = model(input_ids=tokens[:, : mode.prompt], use_cache=True, logits_to_keep=1)
    float(output.logits[-1, -1, 0])
    start = time.perf_counter()
    for position in range(mode.prompt, mode.prompt + mode.tokens):
        output = model(
            input_ids=tokens[:, position : position + 1],
            past_key_values=output.past_key_values,
            use_cache=True,
        )
    float(output.logits[-1, -1, 0])
    return time.perf_counter() - start


def _details(mode: Mode, pairs: Sequence[tuple[float, float]], bound: float) -> dict[str, object]:
    ratio = Spread.of([dense / moe for dense, moe in pairs])
    return {
        "batch": mode.batch,
        "tokens": mode.tokens,
        "dense": _model_details(mode, [dense for dense, _ in pairs]),
        "l0moe": _model_details(mode, [moe for _, moe in pairs]),
        "ratio": ratio.to_json() | {"pairs": [dense / moe for dense, moe in pairs]},
        "bound": bound,
    }


def _model_details(mode: Mode, seconds: Sequence[float]) -> dict[str, object]:
    spread = Spread.of(seconds)
    return {"seconds": spread.to_json(), "tokens_per_second": mode.batch * mode.tokens / spread.median}

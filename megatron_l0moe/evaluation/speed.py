"""The evaluate stage's speed test: a dense model and what was made of it, side by side in one process.

Text is real held-out text and decoding is fed with it (not with the models' own output), so that both models see
the same tokens and the router sees what it was trained for. Prefill computes the logits of every position, as a
plain forward call does, for both models. The protocol is that of `timing.py`; `bench.py` measures more.
"""

import statistics
from collections.abc import Sequence

from transformers import PreTrainedModel

from megatron_l0moe.evaluation.hardware import describe_machine
from megatron_l0moe.evaluation.timing import (
    THREADS,
    WARM_UP_PAIRS,
    Mode,
    Pair,
    Sample,
    Spread,
    TransformersRunner,
    pinned_threads,
    ratios,
    time_pairs,
)
from megatron_l0moe.index.heldout_file import HeldoutSequence
from megatron_l0moe.sizes.parameters import ParameterCounts, speed_bounds

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

"""Expected speed of a trained L0-MoE against its dense base: prefill, and decode against the batch size.

Two bounds that do not depend on the GPU, from `parameters.py`: the ratio of active weights (compute) and of weights
read (memory, uniform routing). And a roofline of one GPU: a pass takes as long as its products at peak or its bytes at
full bandwidth, whichever is longer, the KV cache included. Kernels, launches and sampling cost nothing there: real
speeds are lower.
"""

from dataclasses import dataclass

from megatron_l0moe.sizes.flops import StageModel, forward_flops
from megatron_l0moe.sizes.gpu_models import Gpu
from megatron_l0moe.sizes.parameters import pass_bounds

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WEIGHT_BYTES = 2
"""Of a served weight, in bf16."""


@dataclass(frozen=True, kw_only=True)
class DecodeSpeed:
    """One decode step of `batch` sequences: dense time over L0-MoE time (> 1: the L0-MoE is faster)."""

    batch: int
    active: float
    """Ratio of active weights: what compute allows."""
    bytes_read: float
    """Ratio of weights read: what memory allows."""
    roofline: float
    """Ratio of the roofline's times, KV cache included."""
    dense_tokens_per_second: float
    """The roofline's, on one GPU."""
    moe_tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class PrefillSpeed:
    """A prefill of one sequence, compute bound."""

    tokens: int
    active: float
    """Ratio of active weights."""
    flops: float
    """Ratio of all FLOPs, attention scores included."""


def prefill_speed(dense: StageModel, moe: StageModel, tokens: int) -> PrefillSpeed:
    """Return the bounds of a prefill."""
    return PrefillSpeed(
        tokens=tokens,
        active=pass_bounds(dense.counts, moe.counts, tokens=tokens, logits=tokens).active,
        flops=forward_flops(dense, tokens) / forward_flops(moe, tokens),
    )


def decode_speeds(dense: StageModel, moe: StageModel, gpu: Gpu, context: int) -> list[DecodeSpeed]:
    """Return the speeds of decode steps after `context` tokens, for each batch size."""
    found = []
    for batch in BATCHES:
        bounds = pass_bounds(dense.counts, moe.counts, tokens=batch, logits=batch)
        times = [_decode_seconds(model, gpu, batch, context) for model in (dense, moe)]
        found.append(
            DecodeSpeed(
                batch=batch,
                active=bounds.active,
                bytes_read=bounds.bytes_read,
                roofline=times[0] / times[1],
                dense_tokens_per_second=batch / times[0],
                moe_tokens_per_second=batch / times[1],
            )
        )
    return found


def kv_cache_bytes(model: StageModel) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    return 2 * model.architecture.num_layers * model.kv_width * WEIGHT_BYTES


def _decode_seconds(model: StageModel, gpu: Gpu, batch: int, context: int) -> float:
    scores = 4.0 * context * model.query_width * model.architecture.num_layers
    flops = batch * (2.0 * model.counts.active + scores)
    read = WEIGHT_BYTES * model.counts.read(batch) + batch * context * kv_cache_bytes(model)
    return max(flops / gpu.bf16_flops, read / gpu.memory_bandwidth)

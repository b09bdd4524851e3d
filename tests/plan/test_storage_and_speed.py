"""Bytes on disk and expected speed, by hand and against a written file."""

from pathlib import Path

import pytest
import torch

from megatron_l0moe.experts.expert_file import write_expert
from megatron_l0moe.plan.memory import checkpoint_size, expert_file_bytes, token_bytes
from megatron_l0moe.plan.plan import TABLE5, decode_speeds, kv_cache_bytes, prefill_speed
from megatron_l0moe.sizes.gpu_models import GPUS
from megatron_l0moe.sizes.parameters import speed_bounds

LLAMA, _, QWEN2 = TABLE5
HEADER = 10_000  # of a safetensors file with 120 tensors


def test_checkpoints_by_hand() -> None:
    moe, dense = LLAMA.moe(), LLAMA.dense()
    assert checkpoint_size(moe, bf16=True).optimizer == 12 * moe.counts.total
    assert checkpoint_size(moe, bf16=True).weights == 2 * moe.counts.total + 4 * 24 * 2 * 64
    masked = 24 * 3 * 4096 * 14336
    assert checkpoint_size(dense, bf16=True).optimizer == 12 * masked + 8 * 24 * 14336
    assert checkpoint_size(moe, bf16=False).optimizer == 8 * moe.counts.total


def test_expert_file(tmp_path: Path) -> None:
    """A file with the tensors that experts/extraction.py writes, at a smaller size."""
    moe = LLAMA.moe()
    tensors = {}
    for layer in range(8, 32):
        tensors |= {
            f"layers.{layer}.units": torch.zeros(8, dtype=torch.int32),
            f"layers.{layer}.input_mean": torch.zeros(16),
            **{
                f"layers.{layer}.{name}": torch.zeros(8, 16, dtype=torch.bfloat16)
                for name in ("gate", "up", "down")
            },
        }
    write_expert(tmp_path / "e.safetensors", tensors, width=8, layers=list(range(8, 32)), fingerprints=None)
    formula = 24 * (4 * (8 + 16) + 3 * 8 * 16 * 2)
    assert 0 < (tmp_path / "e.safetensors").stat().st_size - formula < HEADER
    assert expert_file_bytes(moe, bf16=True) == 24 * (4 * (1024 + 4096) + 3 * 1024 * 4096 * 2)
    assert 64 * expert_file_bytes(moe, bf16=True) / 1e9 == pytest.approx(38.7, abs=0.05)
    assert expert_file_bytes(moe, bf16=True, with_weights=False) == 24 * 4 * (1024 + 4096)


def test_tokens() -> None:
    assert [token_bytes(size) for size in (32_000, 65_499, 65_500, 128_256)] == [2, 2, 4, 4]


def test_prefill() -> None:
    """Attention scores, equal on both sides, pull the ratio towards 1; at 8192 (15.0 + 2.1) / (7.8 + 2.1) GFLOP."""
    bounds = [prefill_speed(LLAMA.dense(), LLAMA.moe(), tokens) for tokens in (1, 1200, 8192)]
    assert bounds[0].active == pytest.approx(1.93, abs=0.005)
    assert [b.flops for b in bounds] == pytest.approx([1.93, 1.89, 1.73], abs=0.01)


def test_decode() -> None:
    gpu = GPUS["h100"]
    rows = decode_speeds(LLAMA.dense(), LLAMA.moe(), gpu, 0)
    ratios = {row.batch: row.bytes_read for row in rows}
    assert [ratios[b] for b in (1, 4, 8, 16, 32, 64, 128)] == pytest.approx(
        [1.93, 1.34, 0.99, 0.68, 0.48, 0.37, 0.34], abs=0.006
    )
    assert {round(row.active, 9) for row in rows} == {
        round(speed_bounds(LLAMA.dense().counts, LLAMA.moe().counts).prefill, 9)
    }
    # without a cache a small batch only reads weights
    assert rows[0].roofline == pytest.approx(rows[0].bytes_read)
    assert rows[0].dense_tokens_per_second == pytest.approx(3.35e12 / (2 * LLAMA.dense().counts.active))
    long = decode_speeds(LLAMA.dense(), LLAMA.moe(), gpu, 4096)
    assert rows[4].roofline < long[4].roofline < 1.0  # the cache, equal on both sides


def test_kv_cache_by_hand() -> None:
    assert kv_cache_bytes(LLAMA.moe()) == 2 * 32 * 8 * 128 * 2
    assert kv_cache_bytes(QWEN2.moe()) == 2 * 28 * 4 * 128 * 2

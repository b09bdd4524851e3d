"""Streamed and sharded sums equal naive loops over all tokens; numbers that cannot be used are refused."""

import pytest
import torch

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.experts.unit_choice import CalibrationSums, active_units

TOKENS, HIDDEN, FFN, ACTIVE = 30, 5, 8, 3
# matrices are summed in float32: 30 products of size 1, then compared with float64
FLOAT32_SUM_ATOL = 1e-4


def text():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(TOKENS, HIDDEN, generator=generator)
    activations = torch.randn(TOKENS, FFN, generator=generator)
    sizes = torch.rand(FFN, generator=generator) + 0.1
    return inputs, activations, sizes


def sums(pairs, local=FFN):
    return CalibrationSums(
        hidden=HIDDEN, local=local, width=FFN, pairs=pairs, active=ACTIVE, device=torch.device("cpu")
    )


def naive(pairs):
    """Token by token, pair by pair, in float64."""
    inputs, activations, sizes = (tensor.double() for tensor in text())
    squares, table, pattern = torch.zeros(FFN).double(), torch.zeros(FFN, FFN).double(), None
    pattern = torch.zeros(FFN, HIDDEN).double()
    for x, a in zip(inputs, activations, strict=True):
        ranked = sorted(range(FFN), key=lambda j: -abs(float(a[j])) * float(sizes[j]))
        on = [float(j in ranked[:ACTIVE]) for j in range(FFN)]
        for i in range(FFN):
            squares[i] += a[i] ** 2
            pattern[i] += on[i] * x
            for j in range(FFN):
                table[i, j] += a[i] * a[j] if pairs == "activations" else on[i] * on[j]
    return inputs.mean(0), squares, table, pattern


def collect(pairs, streams, shards):
    """Sums of `streams` data-parallel ranks that hold `shards` tensor-parallel parts each, put together."""
    inputs, activations, sizes = text()
    local = FFN // shards
    ranks = [[sums(pairs, local) for _ in range(shards)] for _ in range(streams)]
    for stream, (x, a) in enumerate(zip(inputs.chunk(streams), activations.chunk(streams), strict=True)):
        for shard in range(shards):
            first = shard * local
            for piece in range(2):  # two micro-batches
                own = a.chunk(2)[piece]
                ranks[stream][shard].add(
                    x.chunk(2)[piece], own[:, first : first + local], own, sizes, first=first
                )
    for shard in range(shards):
        for name in ("tokens", "input_sum", "activation_squares", "pairs", "pattern_inputs"):
            parts = [getattr(ranks[stream][shard], name) for stream in range(streams)]
            if parts[0] is not None:
                setattr(ranks[0][shard], name, sum(parts[1:], parts[0]))
    whole = ranks[0][0]
    names = ["activation_squares", "pairs", "pattern_inputs"]
    parts = {id(getattr(whole, name)): [getattr(r, name) for r in ranks[0]] for name in names}
    return whole.gather(lambda shard: torch.cat(parts[id(shard)]), 1)


@pytest.mark.parametrize("pairs", ["activations", "patterns"])
@pytest.mark.parametrize(("streams", "shards"), [(1, 1), (3, 1), (2, 2), (1, 4)])
def test_sums_equal_naive_loops(pairs, streams, shards):
    found = collect(pairs, streams, shards)
    mean, squares, table, pattern = naive(pairs)
    assert found.tokens == TOKENS
    for got, expected in (
        (found.input_mean, mean),
        (found.activation_squares, squares),
        (found.pairs, table),
    ):
        torch.testing.assert_close(got.double(), expected, atol=FLOAT32_SUM_ATOL, rtol=0)
    assert found.input_mean.dtype is torch.float32
    if pairs == "patterns":
        torch.testing.assert_close(found.pattern_inputs.double(), pattern, atol=FLOAT32_SUM_ATOL, rtol=0)
        assert float(found.pairs.diagonal().sum()) == TOKENS * ACTIVE
    else:
        assert found.pattern_inputs is None
    control = naive("patterns" if pairs == "activations" else "activations")[2]
    assert (found.pairs - control).abs().max() > 100 * FLOAT32_SUM_ATOL


def test_vectors_are_summed_in_float64():
    """100 000 + many tiny squares: float32 would lose every one of them."""
    total = sums("none")
    total.add(torch.zeros(1, HIDDEN), torch.full((1, FFN), 1e4), None, None)
    for _ in range(50):
        total.add(torch.zeros(1, HIDDEN), torch.ones(1, FFN), None, None)
    assert total.activation_squares.tolist() == [1e8 + 50] * FFN
    assert torch.tensor(1e8, dtype=torch.float32) + 1 == 1e8  # control


def test_active_units_by_hand():
    activations = torch.tensor([[1.0, -4.0, 3.0], [0.5, 0.1, -0.4]])
    sizes = torch.tensor([5.0, 1.0, 1.0])  # what they add: 5 4 3, then 2.5 0.1 0.4
    assert active_units(activations, sizes, 2).tolist() == [[1, 1, 0], [1, 0, 1]]
    assert active_units(activations, sizes, 3).tolist() == [[1, 1, 1], [1, 1, 1]]


def test_unusable_numbers_are_refused():
    for name, value, message in (
        ("input_sum", torch.nan, "not finite"),
        ("activation_squares", 0.0, "are 0 on"),
    ):
        inputs, activations, _ = text()
        total = sums("none")
        total.add(inputs, activations, None, None)
        total.gather(lambda shard: shard, 7)
        getattr(total, name).fill_(value)
        with pytest.raises(L0MoEError, match=rf"layer 7 .*{message}|layer 7 {message}"):
            total.gather(lambda shard: shard, 7)

"""The speed measurement: who runs when and on what; spreads, ratios and bounds by hand. No claim about time itself."""

import json
from types import SimpleNamespace

import pytest
import torch

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.evaluation import timing
from megatron_l0moe.evaluation.evaluate import checkpoint_counts
from megatron_l0moe.evaluation.models import load_model
from megatron_l0moe.evaluation.timing import (
    Mode,
    Sample,
    Spread,
    TransformersRunner,
    measure_speed,
    time_pairs,
    timings,
    windows,
)
from megatron_l0moe.index.heldout_file import HeldoutSequence
from megatron_l0moe.runtime.hardware import cpu_model, describe_machine, memory_gib

TEXT = list(range(400))


def test_structure_bounds_and_ratios(models):
    counts = tuple(checkpoint_counts(folder) for folder in models)
    sequences = [HeldoutSequence(tuple(i % 64 for i in range(400)), "a", 0)]
    threads = torch.get_num_threads()
    result = measure_speed(
        load_model(models[0]),
        load_model(models[1]),
        sequences,
        counts=counts,
        prefill_tokens=8,
        decode_tokens=2,
        repeats=3,
    )
    assert torch.get_num_threads() == threads
    assert json.loads(json.dumps(result)) == result
    for mode in ("prefill", "decode_b1", "decode_b8"):
        ratio = result["details"][mode]["ratio"]
        assert result[f"{mode}_ratio"] == ratio["median"] == sorted(ratio["pairs"])[1]
        assert len(ratio["pairs"]) == 3
        assert result["bounds"][mode] == result["details"][mode]["bound"]
    assert result["details"]["decode_b8"]["batch"] == 8
    # LM head 64*16, attention 3*(2*16*16 + 2*16*8), norms 7*16, dense FFN 3*16*32, expert 3*16*8, router 4*16
    fixed = 64 * 16 + 3 * 768 + 7 * 16
    dense = fixed + 3 * 1536
    moe = fixed + 1536 + 2 * 64
    assert result["bounds"]["prefill"] == pytest.approx(dense / (moe + 2 * 2 * 384))
    distinct = 4 * (1 - 0.5**8)
    assert result["bounds"]["decode_b8"] == pytest.approx(dense / (moe + 2 * distinct * 384))
    assert result["settings"]["experts_implementation"] == "grouped_mm"
    assert result["hardware"]["threads"] == 1


class Recorder:
    """Counts calls; every model call advances a made-up clock."""

    device = torch.device("cpu")

    def __init__(self, name, log, clock, cost):
        self.name, self.log, self.clock, self.cost = name, log, clock, cost

    def __call__(self, input_ids, **kwargs):
        self.log.append((self.name, input_ids.tolist()))
        self.clock[0] += self.cost
        return SimpleNamespace(logits=torch.zeros(1, 1, 1), past_key_values=None)


@pytest.fixture
def recorded(monkeypatch):
    log, clock = [], [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    return Recorder("dense", log, clock, 3.0), Recorder("moe", log, clock, 2.0), log


def test_pairs_alternate_on_the_same_text(recorded):
    dense, moe, log = recorded
    mode = Mode(name="prefill", batch=1, tokens=4, prompt=0)
    pairs = time_pairs(TransformersRunner(dense), TransformersRunner(moe), TEXT, mode, 3)
    assert pairs == [(Sample(seconds=3.0), Sample(seconds=2.0))] * 3
    assert [name for name, _ in log] == ["moe", "dense", "dense", "moe", "moe", "dense", "dense", "moe"]
    for first, second in zip(log[::2], log[1::2], strict=True):
        assert first[1] == second[1]
    assert log[2][1] != log[4][1]


def test_decode_times_the_steps_only(recorded):
    dense, moe, log = recorded
    mode = Mode(name="decode_b8", batch=8, tokens=5, prompt=32)
    pairs = time_pairs(TransformersRunner(dense), TransformersRunner(moe), TEXT, mode, 1)
    assert pairs == [(Sample(seconds=15.0), Sample(seconds=10.0))]  # 5 steps each; the prompt is not timed
    calls = [tokens for name, tokens in log[-6:]]
    assert len(calls[0][0]) == 32
    rows = [prompt + [step[row][0] for step in calls[1:]] for row, prompt in enumerate(calls[0])]
    assert rows == windows(TEXT, mode, 0, 1)


def test_windows_differ_between_rows_and_pairs():
    mode = Mode(name="decode_b8", batch=8, tokens=4, prompt=32)
    seen = [tuple(row) for pair in range(3) for row in windows(TEXT, mode, pair, 3)]
    assert len(seen) == len(set(seen)) == 24
    assert all(len(row) == 36 for row in seen)
    assert min(seen)[0] == 0
    assert max(seen)[-1] == 399


def test_too_little_text():
    with pytest.raises(L0MoEError, match="has 400 tokens and decode_b8 needs 576; raise"):
        windows(TEXT, Mode(name="decode_b8", batch=8, tokens=40, prompt=32), 0, 1)


def test_spread_by_hand():
    spread = Spread.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (spread.median, spread.min, spread.max, spread.iqr) == (3.0, 1.0, 5.0, 2.0)
    assert (spread.q1, spread.q3) == (2.0, 4.0)
    assert Spread.of([2.5]) == Spread(median=2.5, min=2.5, max=2.5, q1=2.5, q3=2.5)


def test_energy_is_of_the_timed_part_and_per_token(recorded):
    dense, _, log = recorded
    mode = Mode(name="decode_b8", batch=8, tokens=5, prompt=32)
    runner = TransformersRunner(dense, energy=lambda: 4.0 * len(log))  # 4 joules a call of the model
    sample = runner(windows(TEXT, mode, 0, 1), mode)
    assert sample == Sample(seconds=15.0, joules=20.0)
    result = timings(mode, [(sample, Sample(seconds=10.0))])
    assert result["dense"]["joules_per_token"]["median"] == pytest.approx(20 / 40)
    assert "joules_per_token" not in result["l0moe"]


def test_hardware(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nmodel name\t: Example CPU @ 2.0 GHz\n")
    assert cpu_model(info) == "Example CPU @ 2.0 GHz"
    memory = tmp_path / "meminfo"
    memory.write_text("MemTotal:       16777216 kB\n")
    assert memory_gib(memory) == 16.0
    assert memory_gib(tmp_path / "none") is None
    machine = describe_machine(device="cpu", threads=1)
    assert machine["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__

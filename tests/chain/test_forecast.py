"""Seconds of the stages by hand, and the time left that follows from them."""

from pathlib import Path

import pytest
from chain.test_progress import write_steps
from rich.console import Console
from toy_recipe import make_run, toy_architecture, write_model

from megatron_l0moe.chain import forecast
from megatron_l0moe.chain import progress as estimate
from megatron_l0moe.chain.forecast import COMMAND_SECONDS, JOB_SECONDS, Forecast
from megatron_l0moe.chain.machine import Machine
from megatron_l0moe.chain.progress import Progress
from megatron_l0moe.chain.run_local import outlook
from megatron_l0moe.evaluation import timing
from megatron_l0moe.runs.stages import CHAIN, STAGE_NAMES

CPU = Machine(kind="cpu", name="CPU", cores=2, flops={"float32": 2e6, "bfloat16": 1e6})
# A token of the toy model's expert run: 4 layers (1 dense), H = 32, q = 32, k = v = 16, F = 64, S = 32, V = 128.
ATTENTION, SCORES, FFN, HEAD = 2 * 32 * (32 + 16 + 16 + 32), 2 * 32 * 32, 2 * 3 * 32 * 64, 2 * 32 * 128
FORWARD = 4 * (ATTENTION + SCORES + FFN) + HEAD
# Gradients of inputs in the 3 upper layers (in the first neither projections nor scores) and of their FFNs' weights.
BACKWARD = 3 * (ATTENTION + 2 * SCORES + 2 * FFN) - (ATTENTION + 2 * SCORES) + HEAD


def of(tmp_path: Path, machine: Machine = CPU, **changes) -> Forecast:
    found = forecast.forecast(
        make_run(tmp_path, dtype="float32", **changes).recipe, toy_architecture(), machine
    )
    assert found is not None
    return found


def test_an_expert_token_by_hand(tmp_path: Path) -> None:
    """One thread of two cores gets half of the speed, of which 60 % is reached."""
    found = of(tmp_path)
    second = (FORWARD + BACKWARD) / (0.6 * 1e6)
    assert found.per_token["experts"] == pytest.approx(second, rel=1e-12)
    # 4 experts one after the other, 10 steps of 2 x 32 tokens each
    starts = 4 * (COMMAND_SECONDS + JOB_SECONDS)
    assert found.seconds("experts") == pytest.approx(starts + 4 * 640 * second, rel=1e-12)


def test_side_by_side_takes_half_as_long_and_bf16_its_own_speed(tmp_path: Path) -> None:
    alone, both = of(tmp_path), of(tmp_path, expert_training__at_once=2)
    assert both.seconds("experts") == pytest.approx(alone.seconds("experts") / 2)
    run = make_run(tmp_path, dtype="bfloat16")
    slow = forecast.forecast(run.recipe, toy_architecture(), CPU)
    assert slow is not None
    assert slow.per_token["moe"] == pytest.approx(2 * alone.per_token["moe"])
    more = of(tmp_path, moe_training__parallel={"threads": 4})  # two cores are all there is
    assert more.per_token["moe"] == pytest.approx(alone.per_token["moe"] / 2)


def test_every_stage_has_a_time_and_gpus_and_other_methods_none(tmp_path: Path) -> None:
    found = of(tmp_path)
    assert tuple(found.stages) == STAGE_NAMES
    assert all(found.seconds(name) >= COMMAND_SECONDS for name in STAGE_NAMES)
    gpu = Machine(kind="gpu", name="H100", cores=8, flops={})
    assert forecast.forecast(make_run(tmp_path).recipe, toy_architecture(), gpu) is None
    other = make_run(tmp_path, method="dsmoe", model__expert_ffn=None)
    assert forecast.forecast(other.recipe, toy_architecture(), CPU) is None


def test_time_left_is_the_forecast_until_steps_are_measured(tmp_path: Path) -> None:
    run, found = make_run(tmp_path), of(tmp_path)
    whole = sum(found.seconds(name) for name in STAGE_NAMES)
    assert estimate.seconds_left(run, STAGE_NAMES, found) == pytest.approx(whole)
    # A machine that turns out three times as slow: all steps and all stages that follow take three times as long.
    for k in range(4):
        write_steps(run.expert_folder(k), 10, 3 * 64 * found.per_token["experts"], done=True)
    left = estimate.seconds_left(run, ("assemble", "evaluate"), found)
    assert left == pytest.approx(3 * (found.seconds("assemble") + found.seconds("evaluate")))


def test_a_stage_tells_by_its_messages_how_far_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    parts = {"start": 10.0, "embedded documents": 80.0, "tokenised documents": 10.0}
    found = Forecast(stages={"curate": parts}, per_token={"experts": 1.0, "moe": 1.0})

    def left(spent: float, message: str) -> float | None:
        return estimate.seconds_left(run, ("curate",), found, estimate.Position(spent=spent, message=message))

    assert left(5.0, "encoder") == pytest.approx(
        95.0
    )  # nothing told: what was forecast, less what has passed
    assert left(50.0, "embedded documents: 50/100 (1/s, about 50 s left)") == pytest.approx(50.0)
    assert left(100.0, "embedded documents: 50/100 (1/s)") == pytest.approx(
        100.0
    )  # twice as slow as forecast
    assert left(100.0, "tokenised documents: 50/100") == pytest.approx(5.0 * 100 / 95)
    assert left(500.0, "working") == pytest.approx(10.0)  # far over: a tenth, not nothing
    assert left(1e6, "embedded documents: 50 of 100") == pytest.approx(
        5 * 50.0
    )  # at most five times the forecast


def test_what_is_said_before_the_start(tmp_path: Path) -> None:
    quick = Machine(kind="cpu", name="CPU", cores=2, flops={"float32": 96e9, "bfloat16": 9e9})
    run, found = make_run(tmp_path, dtype="float32"), of(tmp_path, quick)
    lines = outlook(run, CHAIN, quick, found)
    minutes = estimate.words(sum(found.seconds(name) for name in STAGE_NAMES))
    assert "float32 on CPU, 2 cores" in lines[0]
    assert "96 in float32 and 9 in bfloat16" in lines[0]
    assert minutes in lines[1]
    assert len(lines) == 2
    assert "tokens_per_expert" in outlook(run, CHAIN, CPU, of(tmp_path))[-1]  # control: hours
    assert len(outlook(run, CHAIN, quick, None)) == 1  # no forecast, no claim
    progress = Progress(run, CHAIN, Console(record=True, width=200), forecast=found)
    assert "left" in progress.status(CHAIN[0])


def test_the_encoder_is_counted_from_its_config(tmp_path: Path) -> None:
    write_model(tmp_path / "encoder")  # hidden 32, 4 layers, FFN 64
    flops = 2.0 * 4 * (4 * 32 * 32 + 2 * 32 * 64)
    assert forecast._encoder_flops(str(tmp_path / "encoder")) == flops
    (tmp_path / "encoder" / "config.json").write_text("[]")
    assert forecast._encoder_flops(str(tmp_path / "encoder")) == 2.0 * 12 * (4 * 384**2 + 2 * 384 * 1536)


def test_the_speed_test_is_the_one_that_evaluate_does() -> None:
    """Its sizes stand twice: evaluation/timing.py imports torch, which the chain does without."""
    of_forecast = (forecast.WARM_UP_PAIRS, forecast.DECODE_BATCH, forecast.DECODE_PROMPT)
    assert of_forecast == (timing.WARM_UP_PAIRS, timing.BATCH, timing.PROMPT_TOKENS)

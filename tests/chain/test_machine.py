"""The dtype of a run and what it is settled by, with speeds given by hand; and the real measurement once."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from toy_recipe import make_run, write_model

from megatron_l0moe.chain import machine
from megatron_l0moe.chain.machine import Machine, begun, read_record, settle
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs.stages import config_hash

PLAIN = Machine(kind="cpu", name="AMD EPYC", cores=2, flops={})
AMX = dataclasses.replace(PLAIN, name="Xeon with AMX")
SLOW_BF16 = {"float32": 96e9, "bfloat16": 9e9}
FAST_BF16 = {"float32": 150e9, "bfloat16": 900e9}


def settled(run, place=PLAIN, flops=SLOW_BF16, **options):
    return settle(run, place=lambda: place, measure=lambda shapes: dict(flops), **options)


@pytest.mark.parametrize(
    ("flops", "dtype"),
    [
        (SLOW_BF16, "float32"),
        (FAST_BF16, "bfloat16"),
        ({"float32": 100e9, "bfloat16": 119e9}, "float32"),  # not worth the rounding
        ({"float32": 100e9, "bfloat16": 121e9}, "bfloat16"),
    ],
)
def test_auto_takes_what_the_machine_is_fast_in(tmp_path: Path, flops, dtype) -> None:
    run, found = settled(make_run(tmp_path), flops=flops)
    assert (run.recipe.dtype, run.recipe.evaluation.dtype, found.dtype) == (dtype, dtype, dtype)
    assert read_record(run.folder) == machine.MachineRecord(
        dtype=dtype, machine=dataclasses.replace(PLAIN, flops=flops)
    )


@pytest.mark.parametrize("written", ["float32", "bfloat16"])
def test_a_written_dtype_wins(tmp_path: Path, written) -> None:
    slower = FAST_BF16 if written == "float32" else SLOW_BF16
    run, found = settled(make_run(tmp_path, dtype=written), flops=slower)
    assert run.recipe.dtype == written != found.dtype
    assert begun(make_run(tmp_path, dtype=written)).recipe.dtype == written


def test_a_dtype_of_the_evaluation_wins_there(tmp_path: Path) -> None:
    run, _ = settled(make_run(tmp_path, evaluation__dtype="float32"), flops=FAST_BF16)
    assert (run.recipe.dtype, run.recipe.evaluation.dtype) == ("bfloat16", "float32")


def test_gpus_mean_bfloat16_and_are_not_measured(tmp_path: Path) -> None:
    def never(shapes):
        raise AssertionError("measured")

    gpu = Machine(kind="gpu", name="H100", cores=8, flops={})
    for place, options in ((gpu, {}), (PLAIN, {"on_gpus": True})):
        run, found = settle(make_run(tmp_path), place=lambda: place, measure=never, keep=False, **options)  # noqa: B023
        assert (run.recipe.dtype, found.kind) == ("bfloat16", "gpu")
    assert not (tmp_path / "runs").exists()  # keep=False writes nothing


def test_the_record_is_not_measured_again_and_decides_for_the_stages(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    settled(run, flops=FAST_BF16, place=AMX)
    counted = []
    settle(run, place=lambda: AMX, measure=lambda shapes: counted.append(shapes) or SLOW_BF16)
    assert not counted
    assert begun(run).recipe.dtype == "bfloat16"  # on this machine, whatever it is


def test_another_kind_of_machine_is_told_what_differs(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    settled(run, place=AMX, flops=FAST_BF16)
    with pytest.raises(L0MoEError, match=r"was begun in bfloat16 \(Xeon with AMX.*auto means float32.*EPYC"):
        settled(run)
    assert (
        settled(make_run(tmp_path, dtype="bfloat16"))[0].recipe.dtype == "bfloat16"
    )  # what the message says
    settled(run, place=AMX, flops=FAST_BF16)
    assert settled(run, place=PLAIN, flops=FAST_BF16)[0].recipe.dtype == "bfloat16"  # another, but alike


def test_a_run_from_before_there_was_a_dtype_stays_what_it_was(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.folder.mkdir(parents=True)
    (run.folder / "recipe.json").write_text(json.dumps({"name": "toy"}))
    for _ in range(2):  # the second time there is a record of this machine, which would choose otherwise
        assert settled(run, flops=FAST_BF16)[0].recipe.dtype == "float32"


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", '{"dtype": "float32"}', '{"dtype": "float32", "machine": {}}'),
        '{"dtype": "float16", "machine": {"kind": "gpu", "name": "x", "cores": 1, "flops": {}}}',
        '{"dtype": "float32", "machine": {"kind": "cpu", "name": "x", "cores": 1, "flops": {"float32": 0}}}',
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path)
    run.folder.mkdir(parents=True)
    (run.folder / "machine.json").write_text(text)
    with pytest.raises(L0MoEError, match=r"machine\.json.*write the dtype that the run was begun in"):
        begun(run)


def test_hashes_tell_dtypes_apart_and_old_ones_stay(tmp_path: Path) -> None:
    """float32 without a flag is what a recipe without a dtype was; a flag says the same as it did."""
    auto, float32, bfloat16 = (make_run(tmp_path, dtype=d).recipe for d in ("auto", "float32", "bfloat16"))
    flags = {"expert_training__flags": {"bf16": True}, "moe_training__flags": {"bf16": True}}
    flagged = [make_run(tmp_path, dtype=d, **flags).recipe for d in ("auto", "bfloat16")]
    for stage in ("experts", "moe", "evaluate"):
        assert config_hash(stage, auto) == config_hash(stage, float32)
        assert config_hash(stage, float32) != config_hash(stage, bfloat16)
    for stage in ("experts", "moe"):
        assert config_hash(stage, flagged[0]) == config_hash(stage, flagged[1])
    for stage in ("convert", "curate"):
        assert config_hash(stage, float32) == config_hash(stage, bfloat16)


def test_a_flag_against_the_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(L0MoEError, match="sets 'bf16', but dtype is float32"):
        make_run(tmp_path, dtype="float32", moe_training__flags={"bf16": True})
    with pytest.raises(L0MoEError, match="sets 'fp16', but dtype is bfloat16"):
        make_run(tmp_path, dtype="bfloat16", moe_training__flags={"fp16": True})


def test_given_speeds_are_taken_and_checked(monkeypatch) -> None:
    monkeypatch.setenv("L0MOE_CPU_FLOPS", json.dumps(SLOW_BF16))
    assert machine.measured([(8, 8)]) == SLOW_BF16
    monkeypatch.setenv("L0MOE_CPU_FLOPS", '{"float32": 1}')
    with pytest.raises(L0MoEError, match="L0MOE_CPU_FLOPS"):
        machine.measured([(8, 8)])


@pytest.mark.slow
def test_this_machine_is_really_measured(monkeypatch, tmp_path: Path) -> None:
    """Both dtypes, in a process of its own, and of a size that can be: small matrices on a busy machine are slow."""
    monkeypatch.delenv("L0MOE_CPU_FLOPS")
    write_model(tmp_path / "model")
    run, found = settle(make_run(tmp_path, model__path=str(tmp_path / "model")))
    if found.kind == "cpu":
        assert all(1e6 < speed / found.cores < 1e12 for speed in found.flops.values())
        assert run.recipe.dtype == found.dtype
    program = "import sys, megatron_l0moe.chain.machine; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)

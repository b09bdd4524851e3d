"""The whole chain on a toy model with every real part: Megatron's loop, faiss, FlagEmbedding, transformers.

One uninterrupted run is made (`conftest.py`); the tests read it. A second one is killed in its second expert run and
started again with the same command.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from whole_chain import toy_world as toy

from megatron_l0moe.checkpoints.torch_dist import CheckpointReader
from megatron_l0moe.experts.expert_file import ExpertFile
from megatron_l0moe.reports.summary import deterministic_part

pytestmark = pytest.mark.slow
DEADLINE_SECONDS = 600


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


def test_summary_holds_every_promised_number(straight):
    numbers = summary(straight)
    for model in ("dense", "l0moe_untrained", "l0moe"):
        table = numbers["perplexity"][model]
        assert table["overall"] > 1
        assert set(table["per_domain"]) == set(toy.TOPICS)
    assert {"prefill_ratio", "decode_b1_ratio", "decode_b8_ratio"} <= set(numbers["speed"])
    assert numbers["parameters"]["active"] <= numbers["parameters"]["total"]
    expected = {str(layer): toy.EXPERT_FFN for layer in range(toy.DENSE, toy.LAYERS)}
    assert numbers["experts"]["width_per_layer"] == expected
    assert numbers["parity"]["megatron_vs_hf_max_abs"] < 1e-4
    assert numbers["tokens"]["expert"] == 2 * 640
    assert numbers["tokens"]["moe"] == 2 * 256
    assert (straight / "report" / "report.html").is_file()


def test_export_generates_in_a_process_without_this_package(straight):
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM; "
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
        "out = m.generate(torch.arange(8)[None], max_new_tokens=4, do_sample=False); "
        "assert not any(name.split('.')[0] in ('megatron', 'megatron_l0moe') for name in sys.modules); "
        "print(out.shape[1])"
    )
    export = straight / "export"
    done = subprocess.run(
        [sys.executable, "-c", program, str(export)], capture_output=True, text=True, check=False, cwd=export
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "12"


def test_a_second_command_does_nothing(straight, recipe):
    before = {file: file.stat().st_mtime_ns for file in straight.rglob("DONE")}
    start = time.monotonic()
    done = toy.run(recipe, straight.parent)
    assert done.returncode == 0, done.stderr
    assert {file: file.stat().st_mtime_ns for file in straight.rglob("DONE")} == before
    assert time.monotonic() - start < 30


def test_kill_in_the_second_expert_run_changes_nothing(straight, recipe, tmp_path):
    metrics = tmp_path / "toy" / "experts" / "001" / "metrics.jsonl"
    with (tmp_path / "first.log").open("w") as log:
        first = subprocess.Popen(
            toy.command(recipe, tmp_path),
            stdout=log,
            stderr=log,
            env=toy.environment(),
            start_new_session=True,
        )
        try:
            _wait_for_lines(metrics, 6, first)
        finally:
            os.kill(first.pid, signal.SIGKILL)
            first.wait()
    done = toy.run(recipe, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    killed, whole = summary(tmp_path / "toy"), summary(straight)
    assert deterministic_part(killed) == deterministic_part(whole)
    for k in (0, 1):
        one, other = (
            load_file(run / "experts" / f"{k:03d}" / "expert.safetensors")
            for run in (tmp_path / "toy", straight)
        )
        assert set(one) == set(other)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_kill_between_the_last_checkpoint_and_its_note_is_no_failure(straight, recipe, tmp_path):
    """Megatron writes the checkpoint, then the file that names it; the next command finds no step left to train."""
    shutil.copytree(straight, tmp_path / "toy")
    moe = tmp_path / "toy" / "moe"
    for note in ("DONE", "manifest.json", "checkpoints/latest_checkpointed_iteration.txt"):
        (moe / note).unlink()
    last = sorted((moe / "checkpoints").glob("iter_*"))[-1]
    before = {file: file.stat().st_mtime_ns for file in last.iterdir()}
    done = toy.run(recipe, tmp_path, "--from", "moe", "--until", "moe")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (moe / "DONE").is_file()
    assert {file: file.stat().st_mtime_ns for file in last.iterdir()} == before
    assert (moe / "metrics.jsonl").read_bytes() == (straight / "moe" / "metrics.jsonl").read_bytes()


EXPERT_FILE_BYTES = 2_000  # 2 layers x (16 int32 units + a mean of 32 floats), and their names


@pytest.mark.parametrize("control", ["lagrangian", "budget"])
def test_masks_only_mode_goes_through_the_same_chain(straight, recipe, tmp_path, control):
    """From the straight run's data; expert files hold units alone, and the experts are cut out of the dense model."""
    until = "export" if control == "lagrangian" else "assemble"
    flags = {"l0-freeze-fraction": 0.3, "l0-retention-control": control}
    masks = toy.change_recipe(
        recipe, tmp_path / "masks.yaml", "expert_training", train_weights=False, flags=flags
    )
    run = tmp_path / "runs" / "toy"
    for stage in ("convert", "curate"):
        shutil.copytree(straight / stage, run / stage)
    done = toy.run(masks, run.parent, "--until", until)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    dense, moe = (CheckpointReader(run / stage / "megatron") for stage in ("convert", "assemble"))
    for k in (0, 1):
        file = run / "experts" / f"{k:03d}" / "expert.safetensors"
        assert file.stat().st_size < EXPERT_FILE_BYTES
        expert = ExpertFile(file)
        assert not expert.has_weights
        for layer in range(toy.DENSE, toy.LAYERS):
            units = expert.read(layer, "units")
            fc1 = dense.read(f"decoder.layers.{layer}.mlp.linear_fc1.weight")
            got = moe.read(f"decoder.layers.{layer}.mlp.experts.experts.linear_fc1.weight", k, k + 1)[0]
            assert torch.equal(got, torch.cat([fc1[units], fc1[toy.FFN + units]]))
        rows = [json.loads(row) for row in (file.parent / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) == 10
        assert rows[-1]["frozen"] is True
        assert all(row["learning_rate"] is None for row in rows)  # no group of weights
    assert (run / "export" / "config.json").is_file() is (until == "export")
    whole = straight / "experts" / "000" / "expert.safetensors"
    assert whole.stat().st_size > 3 * EXPERT_FILE_BYTES  # control: with weights


@pytest.mark.parametrize(
    ("method", "until"),
    [("obs", "report"), *((method, "assemble") for method in ("random", "magnitude", "svd", "coactivation"))],
)
def test_experts_without_training_go_through_the_same_chain(straight, recipe, tmp_path, method, until):
    """From the straight run's data: the same files as L0's, so that what follows does not see the difference."""
    changed = toy.change_recipe(recipe, tmp_path / "method.yaml", "expert_training", method=method)
    run = tmp_path / "runs" / "toy"
    for stage in ("convert", "curate"):
        shutil.copytree(straight / stage, run / stage)
    done = toy.run(changed, run.parent, "--until", until)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    dense, moe = (CheckpointReader(run / stage / "megatron") for stage in ("convert", "assemble"))
    for k in (0, 1):
        folder = run / "experts" / f"{k:03d}"
        expert, trained = (
            ExpertFile(r / "experts" / f"{k:03d}" / "expert.safetensors") for r in (run, straight)
        )
        assert (expert.width, expert.layers) == (toy.EXPERT_FFN, trained.layers)
        numbers = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["numbers"]
        assert numbers["method"] == method
        assert numbers["calibration_tokens"] == 640
        for layer in expert.layers:
            units = expert.read(layer, "units")
            fc1 = dense.read(f"decoder.layers.{layer}.mlp.linear_fc1.weight")
            got = moe.read(f"decoder.layers.{layer}.mlp.experts.experts.linear_fc1.weight", k, k + 1)[0]
            assert torch.equal(got, torch.cat([fc1[units], fc1[toy.FFN + units]]))
    if until == "report":
        numbers = summary(run)
        assert numbers["tokens"]["expert"] == 0
        assert numbers["construction"]["calibration_tokens"] == 2 * 640
        assert all(0 < row["1"]["relative_error"] < 1 for row in numbers["construction"]["layers"])
        assert numbers["perplexity"]["l0moe"]["overall"] > 1
        page = (run / "report" / "report.html").read_text(encoding="utf-8")
        assert "Made without training" in page
        assert "Made without training" not in (straight / "report" / "report.html").read_text(
            encoding="utf-8"
        )


def _wait_for_lines(file: Path, lines: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, f"the run ended with {process.returncode} before it could be killed"
        if file.exists() and file.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.1)
    raise AssertionError(f"{file} did not reach {lines} steps in {DEADLINE_SECONDS} s")

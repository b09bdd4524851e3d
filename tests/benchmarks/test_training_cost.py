"""The cost benchmark runs, at a size at which its times mean nothing, and its memory figures are right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TINY = {
    "tokens": 64,
    "hidden": 32,
    "ffn": 64,
    "heads": 4,
    "groups": 2,
    "experts": 2,
    "expert-ffn": 16,
    "layers": 2,
}
TINY |= {"vocab": 64, "pairs": 2, "warmup": 1, "threads": 1}
VECTORS_SHARE = 1.1  # at 64 tokens, vectors of F beside activations [64, F]
FLOAT_BYTES = 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_runs_and_writes_its_report(tmp_path: Path, dtype: str) -> None:
    words = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, ROOT / "benchmarks" / "training_cost.py", "--dtype", dtype, *words]
    done = subprocess.run(
        [*command, "--json", tmp_path / "cost.json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "cost.json").read_text(encoding="utf-8"))
    assert report["shape"]["dtype"] == dtype
    assert {"cpu", "device", "versions"} <= set(report["machine"])
    results = {result["name"]: result for result in report["results"]}
    assert len(results) == 8
    for name, result in results.items():
        assert name in done.stdout
        spread = result["time"]
        assert 0 < spread["min"] <= spread["lower_quartile"] <= spread["median"] <= spread["upper_quartile"]
    mlp = results["L0 MLP, forward and backward, lagrangian"]
    assert 1 < mlp["saved_activations"]["ratio"] < VECTORS_SHARE * (1 if dtype == "fp32" else 1.05)
    step = results["L0 MLP, whole training step"]["state"]
    assert 1 < step["ratio"] < VECTORS_SHARE
    # fp32: weights of 2 layers without their gradients and without both moments of Adam
    masks = results["masks only against masks and weights, whole training step"]["state"]
    if dtype == "fp32":
        saved = 2 * 3 * TINY["hidden"] * TINY["ffn"] * 3 * FLOAT_BYTES
        assert masks["stock"] - masks["ours"] == pytest.approx(saved, rel=0.05)

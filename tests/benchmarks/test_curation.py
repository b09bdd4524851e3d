"""The curation benchmark runs, at a size at which its times mean nothing, and what it compares is alike."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

ROOT = Path(__file__).parent.parent.parent
WORDS = ["flour", "butter", "oven", "dough", "quark", "photon", "spin", "sail", "wind", "mast", "rope"]
SIZES = {
    "characters": 4000, "vectors": 3000, "dimension": 16, "clusters": 4, "iterations": 3, "growth": 1,
    "scale-vectors": 500, "scale-dimension": 8, "scale-points": 64, "scale-samples": 128, "repeats": 1,
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    (tmp_path / "model").mkdir()
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "model" / "config.json").write_text(json.dumps({"vocab_size": 300}))
    return tmp_path / "model"


@pytest.mark.slow
def test_it_runs_and_writes_its_report(tmp_path: Path, model: Path) -> None:
    (tmp_path / "corpus").mkdir()
    lines = [json.dumps({"text": " ".join(WORDS[n % 11 :] * (1 + n % 5))}) for n in range(80)]
    (tmp_path / "corpus" / "a.jsonl").write_text("\n".join(lines))
    words = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    command = [
        sys.executable,
        ROOT / "benchmarks" / "curation.py",
        "--corpus",
        tmp_path / "corpus",
        "--model",
        model,
    ]
    done = subprocess.run(
        [*command, *words, "--scratch", tmp_path, "--json", tmp_path / "report.json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert {"cpu", "cores", "versions"} <= set(report["machine"])
    results = {result["name"]: result for result in report["results"]}
    assert all(name in done.stdout for name in results)
    ours, datatrove = results["tokenise, ours"], results["tokenise, datatrove"]
    assert datatrove["same_bytes_as_ours"]
    assert ours["tokens"] == datatrove["tokens"] > 500
    found = results["k-means and assignment"]
    assert found["objective"][0] == pytest.approx(found["objective"][1], abs=1e-6)  # the same training points
    assert found["points"] == 3000
    assert results["CCM and order"]["seconds"]["median"] > 0
    growth = [name for name in results if name.startswith("growth of")]
    assert len(growth) == 3
    assert all(results[name]["peak_mb"] > results[name]["above_start_mb"] >= 0 for name in growth)

"""The quickstart's chain, with the paper's own masks, on its real model and corpus with next to no tokens.

The toy chain beside it runs real parts on a random model of a few thousand weights; here are the model, tokenizer,
encoder and corpus that a new user meets first. Numbers of quality mean nothing at this budget and are not looked at.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.quickstart
ROOT = Path(__file__).parents[2]
SECONDS = 900
LEAST = {
    "dtype": "float32",
    "model": {"num_experts": 2, "dense_layers": 26},
    "data": {
        "seq_length": 64,
        "tokens_per_expert": 640,
        "tokens_per_set": 256,
        "heldout_tokens_per_domain": 64,
        "embedding_max_tokens": 32,
    },
    "expert_training": {
        "method": "l0",
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "learning_rate": 1e-3,
        "save_interval": 10,
        "flags": {"l0-freeze-fraction": 0.3},
    },
    "moe_training": {"micro_batch_size": 2, "flags": {}},
    "evaluation": {"prefill_tokens": 32, "decode_tokens": 2, "repeats": 1, "parity_positions": 16},
}
OURS = re.compile(
    r"^(Computing in|This will take|stage \d|    |Report:|Model:|Perplexity|Speed|Parameters|Parity|Training)"
)


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("quickstart")
    recipe = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text(encoding="utf-8"))
    for key, value in LEAST.items():
        recipe[key] = recipe[key] | value if isinstance(value, dict) else value
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    words = [sys.executable, "tools/fetch_quickstart_models.py"]
    subprocess.run(words, cwd=ROOT, check=True, timeout=SECONDS)
    words = [
        sys.executable,
        "-m",
        "megatron_l0moe",
        "run",
        str(folder / "tiny.yaml"),
        "--runs-dir",
        str(folder),
    ]
    done = subprocess.run(
        words,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout, folder / recipe["name"]


def test_every_stage_ran_on_the_real_model(output) -> None:
    _, run = output
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["recipe"]["dtype"] == "float32"
    assert summary["parity"]["megatron_vs_hf_max_abs"] < 1e-4
    assert summary["parameters"]["dense"] == 134_515_008  # SmolLM2-135M, by its own config.json
    assert (
        5 < summary["perplexity"]["dense"]["overall"] < 100
    )  # a trained model: a random one has about 49,152
    assert summary["experts"]["width_per_layer"] == {str(layer): 384 for layer in range(26, 30)}
    assert summary["tokens"]["expert"] == 2 * 640


def test_the_terminal_shows_our_lines_only(output) -> None:
    """No warning of Megatron, torch or transformers, which the logs keep."""
    text, run = output
    assert [line for line in text.splitlines() if line and not OURS.match(line)] == []
    assert re.search(r"This will take about \d+", text)
    assert "UserWarning" in (run / "logs" / "curate.log").read_text(
        encoding="utf-8"
    )  # control: there are some

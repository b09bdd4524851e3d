"""Killed at random moments of a step and run again, curate makes the same files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import curate_worlds as worlds
import pytest
import yaml

ROOT = Path(__file__).parents[3]
SMALL = ["--scan-bytes", "1500", "--embed-documents", "9", "--tokenise-tokens", "150"]


@pytest.mark.slow
def test_every_step(tmp_path: Path, write_lines, topic_text, tiny_lm, tiny_encoder) -> None:
    corpus = worlds.write_corpus(tmp_path / "corpus", write_lines, topic_text)
    recipe = worlds.make_recipe(corpus, tiny_lm, tiny_encoder)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    words = [
        sys.executable,
        str(ROOT / "benchmarks" / "curate_kills.py"),
        str(file),
        "--out",
        str(tmp_path / "runs"),
    ]
    options = ["--kills", "1", "--seed", "5", "--steps", "scan", "embed", "tokenise", "index"]
    done = subprocess.run(
        [*words, *options, *SMALL], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, *steps = [json.loads(line) for line in done.stdout.splitlines()]
    assert min(first["units"].values()) >= 3
    assert [(line["step"], line["killed"], line["different"]) for line in steps] == [
        (step, 1, 0) for step in ("scan", "embed", "tokenise", "index")
    ]
    assert steps[-1]["units kept"] > 0  # so the reruns did go on from something

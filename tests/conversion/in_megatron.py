"""Logits of checkpoints in real Megatron models, from a process of its own: it patches torch for the CPU."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

PROGRAM = Path(__file__).with_name("megatron_logits.py")
ROOT = Path(__file__).parents[2]


def megatron_logits(
    checkpoints: Mapping[str, Path], ids: torch.Tensor, folder: Path
) -> dict[str, torch.Tensor]:
    """Return each named checkpoint's logits; the process' files go into `folder`."""
    jobs, out = folder / "jobs.json", folder / "logits.pt"
    rows = [
        {"name": name, "checkpoint": str(path), "ids": ids.tolist()} for name, path in checkpoints.items()
    ]
    jobs.write_text(json.dumps(rows))
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(jobs), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logits: dict[str, torch.Tensor] = torch.load(out)
    return logits

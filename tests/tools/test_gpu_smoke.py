"""tools/gpu_smoke.sh: what it says without a GPU, its verdicts, and the whole of it on two CPU processes."""

import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "gpu_smoke.sh"


def smoke(*words: str, timeout: int = 60, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env},
        check=False,
        timeout=timeout,
    )


def python_that_fails(folder: Path, pattern: str) -> str:
    """Write a stand-in for Python that does nothing, and fails where its words match a shell pattern."""
    file = folder / "python"
    file.write_text(f'#!/bin/bash\ncat >/dev/null\ncase "$*" in {pattern}) echo "it broke"; exit 1 ;; esac\n')
    file.chmod(0o755)
    return str(file)


def test_without_a_gpu() -> None:
    done = smoke()
    assert done.returncode == 3
    assert done.stdout.startswith("No GPU was found on this machine")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


@pytest.mark.parametrize("words", [["--cpu"], ["--cpu", "0"], ["--gpu"], ["--cpu", "2", "--out", ""]])
def test_wrong_use(words: list[str]) -> None:
    done = smoke(*words)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("pattern", "reasons"),
    [
        ("*--until*", ["train"]),
        (r"*tools/loss_compare.py*--stage\ moe*", ["parity_moe"]),
        ("*tools/loss_compare.py*", ["parity_expert", "parity_moe"]),
        ("never", []),
    ],
)
def test_verdict(tmp_path: Path, pattern: str, reasons: list[str]) -> None:
    """Every failed step is a reason of the one verdict line, and nothing is compared after a failed training."""
    out = tmp_path / "out"
    done = smoke("--cpu", "2", "--out", str(out), PYTHON=python_that_fails(tmp_path, pattern))
    verdict = done.stdout.splitlines()[-1]
    assert done.returncode == (1 if reasons else 0)
    assert verdict.startswith("FAIL gpu_smoke" if reasons else "PASS gpu_smoke")
    assert re.findall(r"(\w+), see", verdict) == reasons
    assert (f"FAIL  {reasons[0]}" in done.stdout and "it broke" in done.stdout) if reasons else True
    assert (out / "parity_moe.log").is_file() == (reasons != ["train"])


def test_a_folder_with_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    done = smoke("--cpu", "2", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "is not empty" in done.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_on_two_cpu_processes(tmp_path: Path) -> None:
    done = smoke("--cpu", "2", "--quick", "--out", str(tmp_path / "out"), timeout=900)
    logs = "".join(file.read_text(errors="replace")[-1500:] for file in (tmp_path / "out").glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    verdict = done.stdout.splitlines()[-1]
    assert verdict.startswith("PASS gpu_smoke: 2 process(es) on CPU, gloo")
    assert "expert tp2,sp, moe ep2" in verdict
    steps = (tmp_path / "out" / "check_steps.log").read_text()
    assert steps.count("loss") == 3, "two experts and the MoE"

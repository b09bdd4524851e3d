"""Which of many logs says why a job ended."""

import os
from pathlib import Path

from megatron_l0moe.runs.child_process import reason_in


def test_reason_of_many_logs(tmp_path: Path) -> None:
    lines = {
        "a": "RuntimeError: NCCL gave up",
        "b": "MemoryError: full",
        "c": "ValueError: late",
        "d": "step 3",
    }
    for age, (name, line) in enumerate(lines.items()):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stderr.log").write_text(line + "\n")
        os.utime(tmp_path / name / "stderr.log", (age, age))
    assert reason_in(tmp_path) == "MemoryError: full"
    (tmp_path / "b" / "stderr.log").unlink()
    (tmp_path / "c" / "stderr.log").unlink()
    assert reason_in(tmp_path) == (
        "a process was killed, or a node or the network was lost (RuntimeError: NCCL gave up)"
    )
    (tmp_path / "a" / "stderr.log").unlink()
    assert reason_in(tmp_path) == "step 3"
    assert reason_in(tmp_path / "a") == "nothing was written to its log"

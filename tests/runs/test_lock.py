"""One command at a time, and no stale locks."""

import errno
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs.lock import INHERITED, locked

HOLDER = """
import sys, time
from pathlib import Path
from megatron_l0moe.runs.lock import locked
expert = int(sys.argv[2]) if len(sys.argv) > 2 else None
with locked(Path(sys.argv[1]), expert=expert):
    print("held", flush=True)
    time.sleep(100)
"""


def hold(folder: Path, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", HOLDER, str(folder), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_second_command_is_refused_then_let_in(tmp_path: Path) -> None:
    holder = hold(tmp_path / "run")
    try:
        with (
            pytest.raises(
                L0MoEError, match=rf"Another command \(process {holder.pid} on .*\) works on .*run; wait"
            ),
            locked(tmp_path / "run"),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
    with locked(tmp_path / "run", wait=0.0):  # the killed command's lock is not stale
        pass


def test_nested_calls_share_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(INHERITED, raising=False)
    with locked(tmp_path) as outer, locked(tmp_path) as inner:
        assert outer == inner
    with locked(tmp_path, wait=0.0):
        pass


def test_child_process_shares_the_lock(tmp_path: Path) -> None:
    with locked(tmp_path) as handles:
        command = [sys.executable, "-c", HOLDER.replace("time.sleep(100)", "pass"), str(tmp_path)]
        done = subprocess.run(command, pass_fds=handles, capture_output=True, text=True, check=False)
    assert done.stdout == "held\n"


def test_children_of_a_killed_command_keep_the_lock(tmp_path: Path) -> None:
    code = (
        "import os, subprocess, sys, time\nfrom pathlib import Path\n"
        "from megatron_l0moe.runs.lock import locked\n"
        "with locked(Path(sys.argv[1])) as handles:\n"
        "    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3)'], pass_fds=handles)\n"
        "    print('held', flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    process.wait()
    with pytest.raises(L0MoEError, match="Processes of an earlier command"), locked(tmp_path, wait=0.3):
        pass
    started = time.monotonic()
    with locked(tmp_path, wait=20.0):
        assert time.monotonic() - started > 0.2
    if process.stdout is not None:
        process.stdout.close()


def test_experts_side_by_side(tmp_path: Path) -> None:
    holder = hold(tmp_path, "0")
    try:
        with locked(tmp_path, expert=1, wait=0.0):
            pass
        with pytest.raises(L0MoEError, match="Another command"), locked(tmp_path, expert=0):
            pass
        with pytest.raises(L0MoEError, match="Another command"), locked(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("megatron_l0moe.runs.lock.fcntl.flock", flock)
    with locked(tmp_path) as handles:
        assert len(handles) == 1
    assert "does not offer locks" in caplog.text

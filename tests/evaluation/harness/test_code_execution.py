"""Programs that a model might write, run for real: what passes, what is stopped, and what stays untouched outside.

Every escape has its counterpart here without the isolation (CONTROL), which shows that the attempt is a real one.
"""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.evaluation.harness import code_execution, code_sandbox
from megatron_l0moe.evaluation.harness.code_execution import (
    build_predictions,
    build_predictions_instruct,
    estimate,
    pass_at_k,
    run_program,
)

SLACK_SECONDS = 10.0
"""Interpreter start and a busy machine."""


@pytest.fixture(scope="module", autouse=True)
def isolation():
    """Skip where the kernel does not permit it."""
    try:
        code_execution.check_available()
    except L0MoEError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        ("assert sum([1, 2]) == 3", "passed"),
        ("assert sum([1, 2]) == 4", "failed: AssertionError"),
        ("def (", "failed: SyntaxError"),
        ("import math, re, typing, hashlib, collections, itertools, datetime, random", "passed"),
        ("raise SystemExit(0)", "failed: SystemExit"),
        ("import os; os._exit(0)", "failed: it ended its process"),
        ("assert input()", "failed: EOFError"),
        ("print('x' * 10**7)", "passed"),
        ("open('a', 'w').write('b'); assert open('a').read() == 'b'", "passed"),
        ("x = 'a' * 10**10", "failed: MemoryError"),
        ("open('big', 'w').write('x' * 2**25)", "failed: OSError"),
        ("import os\nwhile True: os.fork()", "failed: PermissionError"),
        ("import threading; threading.Thread(target=print).start()", "failed: RuntimeError"),
        ("import subprocess; subprocess.run(['true'])", "failed: PermissionError"),
        ("import os; os.execv('/bin/true', ['true'])", "failed: PermissionError"),
        ("import os; os.kill(-1, 9)", "failed: ProcessLookupError"),
        ("import os; os.unshare(os.CLONE_NEWUSER)", "failed: PermissionError"),
    ],
    ids=lambda value: value if len(value) < 24 else value[:20],
)
def test_verdict(program, verdict):
    assert run_program(program) == verdict


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_endless_program_is_ended(program):
    start = time.monotonic()
    assert run_program(program, seconds=1.0) == "timed out"
    assert time.monotonic() - start < 1.0 + SLACK_SECONDS


def test_no_network():
    """A listening port of this machine, reached by the same program without isolation."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        assert run_program(program) == "failed: PermissionError"
        assert unprotected(program) == 0  # CONTROL


def test_own_network_namespace_without_the_filter(tmp_path):
    """The namespace alone cuts the network off too: the system call filter is not the only wall."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = (
            f"import sys, socket; sys.path.insert(0, {str(Path(code_sandbox.__file__).parent)!r})\n"
            "import code_sandbox\ncode_sandbox.enter_namespaces()\n"
            f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        )
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=False
        )
    assert "Network is unreachable" in done.stderr


@pytest.mark.parametrize("action", ["open({!r}, 'w').write('x')", "__import__('os').remove({!r})"])
def test_files_outside_stay(tmp_path, action):
    mine = tmp_path / "mine.txt"
    mine.write_text("kept")
    program = action.format(str(mine))
    assert run_program(program) == "failed: OSError"
    assert mine.read_text() == "kept"
    assert unprotected(program) == 0  # CONTROL
    assert not mine.exists() or mine.read_text() == "x"


def test_read_only_file_system_cannot_be_undone(tmp_path):
    program = (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "assert libc.mount(b'none', b'/', None, 0x20 | 0x1000, None) == -1\n"  # MS_REMOUNT | MS_BIND
        "assert libc.umount2(b'/tmp', 2) == -1"
    )
    assert run_program(program) == "passed"


def test_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(code_execution.tempfile, "tempdir", str(tmp_path))
    assert run_program("open('left', 'w').write('x')") == "passed"
    assert list(tmp_path.iterdir()) == []


def test_pass_at_k_by_hand():
    """Two of three programs double their input: pass@1 = 2/3; of any two at least one passes: pass@2 = 1."""
    programs = [f"def f(x):\n    return {body}" for body in ("x * 2", "x + x", "x * 3")]
    test = "def check(f):\n    assert f(4) == 8\ncheck(f)"
    assert pass_at_k([test], [programs], k=[1, 2, 5]) == {"pass@1": pytest.approx(2 / 3), "pass@2": 1.0}
    assert pass_at_k([test], [programs[2:]], k=[1]) == {"pass@1": 0.0}


@pytest.mark.parametrize(
    ("n", "passed", "k", "expected"), [(4, 1, 2, 0.5), (4, 0, 2, 0.0), (4, 3, 2, 1.0), (1, 1, 1, 1.0)]
)
def test_estimate(n, passed, k, expected):
    assert estimate(n, passed, k) == expected


def test_predictions():
    docs = [{"prompt": "def f():\n"}]
    assert build_predictions([["    return 1", "    return 2"]], docs) == [
        ["def f():\n    return 1", "def f():\n    return 2"]
    ]
    assert build_predictions_instruct([["    return 1\n```\nIt returns 1."]], docs) == [
        ["def f():\n    return 1\n"]
    ]


def test_refuses_where_it_cannot_isolate(tmp_path, monkeypatch):
    """A launcher that is not permitted to make a namespace says so, and the program is not run."""
    launcher = tmp_path / "code_sandbox.py"
    source = Path(code_sandbox.__file__).read_text()
    assert source.count("os.unshare(flags)") == 1
    launcher.write_text(source.replace("os.unshare(flags)", "raise OSError(1, 'Operation not permitted')"))
    monkeypatch.setattr(code_sandbox, "__file__", str(launcher))
    with pytest.raises(
        L0MoEError, match=r"cannot isolate it \(user and network namespaces \(Operation not perm"
    ):
        run_program("pass")


def test_other_machines_are_named(monkeypatch):
    monkeypatch.setattr(code_execution.platform, "machine", lambda: "riscv64")
    with pytest.raises(L0MoEError, match="Linux on x86_64 or aarch64"):
        code_execution.check_available.__wrapped__()


def unprotected(program: str) -> int:
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, check=False)
    return done.returncode

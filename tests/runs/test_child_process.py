"""Real processes, short ones: logs, failures, stopping, and that nothing is left behind.

Which of many logs says why a job ended.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import PATIENCE, alive, wait_until

from megatron_l0moe.runs.child_process import (
    Command,
    CommandFailedError,
    last_meaningful_line,
    reason_in,
    run_command,
    run_commands,
)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_output_goes_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "a.log"
    run_command(python("import sys; print('out'); print('err', file=sys.stderr)"), log=log)
    run_command(python("import os; print(os.environ['X'])"), log=log, env={"X": "again"})
    lines = [line for line in log.read_text().splitlines() if not line.startswith("$ ")]
    assert sorted(lines[:2]) == ["err", "out"]
    assert lines[2] == "again"


def test_failure_names_code_line_and_log(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    code = "import sys; print('warming up'); raise ValueError('rank is bad')"
    with pytest.raises(
        CommandFailedError, match=r"exit code 1: ValueError: rank is bad; its log is .*a\.log"
    ) as caught:
        run_command(python(code), log=log)
    assert caught.value.code == 1


def test_killed_child_is_called_so(tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(
        CommandFailedError, match=r"was killed \(often: not enough memory\): it printed nothing"
    ):
        run_command(python(code), log=tmp_path / "a.log")


def test_poll_is_called(tmp_path: Path) -> None:
    calls: list[int] = []
    code = "import time; time.sleep(0.3)"
    run_command(python(code), log=tmp_path / "a.log", poll=lambda: calls.append(1), interval=0.05)
    assert len(calls) >= 3


def test_orphan_in_its_own_session_is_ended(tmp_path: Path) -> None:
    """What torchrun's workers are when torchrun is killed."""
    note = tmp_path / "pid"
    worker = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(100)"
    code = (
        "import subprocess, sys, time, os\n"
        f"subprocess.Popen([sys.executable, '-c', {worker!r}], start_new_session=True)\n"
        f"while not os.path.exists({str(note)!r}) or not open({str(note)!r}).read(): time.sleep(0.02)\n"
    )
    run_command(python(code), log=tmp_path / "a.log")
    assert not alive(int(note.read_text()))


def test_other_children_are_left_alone(tmp_path: Path) -> None:
    bystander = subprocess.Popen(python("import time; time.sleep(100)"))
    try:
        run_command(python("pass"), log=tmp_path / "a.log")
        assert alive(bystander.pid)
    finally:
        bystander.kill()
        bystander.wait()


def sleeper(seconds: float, folder: Path) -> list[str]:
    """A command that notes when it begins and when it ends."""
    return python(
        "import os, time, pathlib\n"
        f"note = pathlib.Path({str(folder)!r}) / (os.environ['PLACE'] + '-' + str(os.getpid()))\n"
        f"begin = time.monotonic(); time.sleep({seconds}); note.write_text(f'{{begin}} {{time.monotonic()}}')"
    )


@pytest.mark.parametrize(("at_once", "most"), [(1, 1), (2, 2)])
def test_as_many_at_the_same_time_as_wanted(tmp_path: Path, at_once: int, most: int) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    commands = [Command(words=sleeper(0.6, notes), log=tmp_path / f"{n}.log") for n in range(4)]
    run_commands(commands, at_once=at_once, share=lambda place: {"PLACE": str(place)}, interval=0.02)
    times = [tuple(map(float, note.read_text().split())) for note in notes.iterdir()]
    assert len(times) == 4
    assert max(sum(begin <= other < end for begin, end in times) for other, _ in times) == most
    assert {note.name.split("-")[0] for note in notes.iterdir()} == {str(n) for n in range(at_once)}


def test_the_first_failure_ends_the_others(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    endless = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(100)"
    failing = (
        f"import os, time\nwhile not os.path.exists({str(note)!r}): time.sleep(0.02)\nraise ValueError('bad')"
    )
    commands = [
        Command(words=python(code), log=tmp_path / f"{n}.log")
        for n, code in enumerate((endless, failing, "open('never', 'w')"))
    ]
    with pytest.raises(CommandFailedError, match=r"ValueError: bad; its log is .*1\.log"):
        run_commands(commands, at_once=2, interval=0.02, grace=5.0)
    assert not alive(int(note.read_text()))
    assert not (tmp_path / "2.log").exists()


RUNNER = """
import sys
from pathlib import Path
from megatron_l0moe.runs.child_process import run_command
note = sys.argv[1]
child = (
    "import os, subprocess, sys, time\\n"
    "g = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\\n"
    f"open({note!r}, 'w').write(str(os.getpid()) + ' ' + str(g.pid) + ' .')\\n"
    "time.sleep(100)\\n"
)
try:
    run_command([sys.executable, "-c", child], log=Path(note + ".log"), grace=2.0)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def runner(tmp_path: Path) -> tuple["subprocess.Popen[bytes]", list[int]]:
    """A process that runs a command that has a child of its own; yields it and the pids below it."""
    note = tmp_path / "note"
    process = subprocess.Popen([sys.executable, "-c", RUNNER, str(note)])
    wait_until(lambda: note.is_file() and note.read_text().endswith("."))
    return process, [int(word) for word in note.read_text().split()[:2]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_stopping_ends_the_whole_tree(
    runner: tuple["subprocess.Popen[bytes]", list[int]], number: int
) -> None:
    process, below = runner
    process.send_signal(number)
    assert process.wait(PATIENCE) == 130
    assert [alive(pid) for pid in below] == [False, False]


def test_kill_minus_9_ends_the_child(runner: tuple["subprocess.Popen[bytes]", list[int]]) -> None:
    process, (child, grandchild) = runner
    process.kill()
    process.wait()
    try:
        wait_until(lambda: not alive(child))
    finally:
        for pid in (child, grandchild):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nb\n", "b"),
        ("", "it printed nothing"),
        (
            "[rank0]: megatron_l0moe.errors.L0MoEError: The corpus is empty.\n\nlater\n",
            "The corpus is empty.",
        ),
        ("Error: bad index.\nE1121 torch.distributed.elastic failed\n", "bad index."),
        (
            "RuntimeError: one\ntorch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n",
            "RuntimeError: one",
        ),
        ("ValueError: first\nKeyError: 'second'\nbye\n", "KeyError: 'second'"),
    ],
)
def test_last_meaningful_line(tmp_path: Path, text: str, line: str) -> None:
    log = tmp_path / "log"
    log.write_text(text)
    assert last_meaningful_line(log) == line


TORCHRUN = """E1122 01:15:45 22442 site-packages/torch/distributed/elastic/multiprocessing/api.py:1002] failed
Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
  File "/venv/torch/distributed/run.py", line 1142, in <module>
    main()
    ^^^^^^
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
megatron_l0moe.training.pretrain FAILED
------------------------------------------------------------
Failures:
  <NO_OTHER_FAILURES>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_01:15:45
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : 2 (pid: 22591)
  error_file: <N/A>
  traceback : {reason}
============================================================
"""
"""What torch 2.14 prints after a worker has failed, shortened."""
NO_REASON = "To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html"


@pytest.mark.parametrize(
    ("text", "reason", "line"),
    [
        (
            "usage: pretrain.py [-h]\npretrain.py: error: unrecognized arguments: --foo\n",
            NO_REASON,
            "error: unrecognized arguments: --foo",
        ),
        (
            "[rank0]: Traceback (most recent call last):\n[rank0]: torch.OutOfMemoryError: too big\n",
            NO_REASON,
            "OutOfMemoryError: too big",
        ),
        ("torch.distributed.DistBackendError: no peer\n", NO_REASON, "DistBackendError: no peer"),
        ("Error: The corpus is empty.\n", NO_REASON, "The corpus is empty."),
        ("loading\n", NO_REASON, "loading"),
        ("", NO_REASON, "it printed nothing"),
        (
            "RuntimeError: connection closed by peer\n",
            "Signal 9 (SIGKILL) received by PID 7",
            "a worker was killed (often: not enough memory)",
        ),
        ("loading\n", "Signal 11 (SIGSEGV) received by PID 7", "a worker was ended by SIGSEGV"),
    ],
    ids=["flag", "exception", "network", "sentence", "no error", "nothing", "killed", "crashed"],
)
def test_launchers_report_is_not_the_reason(tmp_path: Path, text: str, reason: str, line: str) -> None:
    log = tmp_path / "log"
    log.write_text(text + TORCHRUN.format(reason=reason))
    assert last_meaningful_line(log) == line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "[rank0]: OSError: [Errno 28] No space left on device: 'x'\n[rank0]:   File \"<frozen runpy>\", li",
            "OSError: [Errno 28] No space left on device: 'x'",
        ),
        (
            "RuntimeError: write: Disk quota exceeded\nValueError: later\n",
            "RuntimeError: write: Disk quota exceeded",
        ),
        ("Error: No space left on the device x\nValueError: later\n", "ValueError: later"),
    ],
)
def test_a_full_disk_goes_before_what_fails_after_it(tmp_path: Path, text: str, line: str) -> None:
    """Megatron's save says it some lines before the end, and the log on the same disk is cut."""
    log = tmp_path / "log"
    log.write_text("OSError: [Errno 28] No space left on device: 'of yesterday'\n")
    start = log.stat().st_size
    with log.open("a") as file:
        file.write(text)
    assert last_meaningful_line(log, start) == line
    assert (reason_in(log) == line) == ("later" not in line)


def test_our_sentence_wins_where_the_exit_code_says_so(tmp_path: Path) -> None:
    code = "import sys; print('Error: Mend this.'); print('ValueError: in a thread'); sys.exit({})"
    for number, line in ((2, "Mend this"), (1, "ValueError: in a thread")):
        with pytest.raises(CommandFailedError, match=f"exit code {number}: {line}; its log is"):
            run_command(python(code.format(number)), log=tmp_path / f"{number}.log")


def test_last_meaningful_line_of_this_command_only(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("ValueError: of yesterday\n")
    start = log.stat().st_size
    with log.open("a") as file:
        file.write("all is well\n")
    assert last_meaningful_line(log, start) == "all is well"


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

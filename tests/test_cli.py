"""The command as a person meets it: help, exit codes, one sentence on stderr."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from toy_recipe import write_model, write_recipe
from typer.testing import CliRunner

import megatron_l0moe
from megatron_l0moe import cli, commands, errors
from megatron_l0moe.chain import run_local
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.layout import MOST_PROCESSES
from megatron_l0moe.runs.child_process import CommandFailedError
from megatron_l0moe.runs.stages import CHAIN, STAGE_NAMES

HELP_SECONDS = 1.5
"""What a person accepts; the best of three runs counts, because the test machine may be busy."""


def l0moe(*words: str) -> "subprocess.CompletedProcess[str]":
    root = Path(megatron_l0moe.__file__).parent.parent
    command = [sys.executable, "-m", "megatron_l0moe", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)


def invoke(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, list(words))
    return result.exit_code, result.stdout, result.stderr


def test_help_names_every_stage_and_is_quick() -> None:
    times = []
    for _ in range(3):
        started = time.monotonic()
        done = l0moe("--help")
        times.append(time.monotonic() - started)
        assert done.returncode == 0
    for name in ("run", *STAGE_NAMES):
        assert f" {name} " in done.stdout
    assert "examples/quickstart.yaml" in done.stdout
    assert min(times) < HELP_SECONDS


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom megatron_l0moe import cli\n"
        "heavy = {'torch', 'transformers', 'megatron', 'matplotlib', 'numpy', 'faiss'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    assert l0moe_python(code) == ""


def test_chain_imports_no_torch() -> None:
    code = (
        "import sys\nimport megatron_l0moe.chain.run_local, megatron_l0moe.chain.dry_run\n"
        "sys.exit('torch is imported' if 'torch' in sys.modules else 0)"
    )
    assert l0moe_python(code) == ""


def l0moe_python(code: str) -> str:
    root = Path(megatron_l0moe.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    return done.stderr


def test_version() -> None:
    assert invoke("--version") == (0, f"{megatron_l0moe.__version__}\n", "")


def test_unknown_key_ends_with_one_sentence(tmp_path: Path) -> None:
    done = l0moe("run", str(write_recipe(tmp_path, data__seq_lenght=1)))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "unknown key 'data.seq_lenght' (did you mean 'seq_length'?)" in done.stderr


def test_missing_model_ends_with_one_sentence(tmp_path: Path) -> None:
    code, out, err = invoke("run", str(write_recipe(tmp_path)), "--runs-dir", str(tmp_path / "runs"))
    assert (code, out) == (2, "")
    assert err.startswith("Model folder models/toy does not exist")
    assert not (tmp_path / "runs").exists()


def test_dry_run_of_some_stages(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    recipe = write_recipe(tmp_path, model__path=str(model))
    runs = tmp_path / "runs"
    words = ("--dry-run", "--from", "experts", "--until", "assemble", "--runs-dir", str(runs))
    code, out, err = invoke("run", str(recipe), *words)
    assert (code, err) == (0, "")
    assert "3. experts:" in out
    assert "4. assemble:" in out
    assert "5. moe:" not in out
    assert not runs.exists()


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "examples").glob("*.yaml")), ids=lambda p: p.stem
)
def test_examples_have_a_plan(path: Path) -> None:
    code, out, err = invoke("run", str(path), "--dry-run")
    assert (code, err) == (0, "")
    assert all(f". {spec.name}: {spec.does}" in out for spec in CHAIN)


def test_unknown_stage(tmp_path: Path) -> None:
    code, _, err = invoke("run", str(write_recipe(tmp_path)), "--dry-run", "--from", "expert")
    assert code == 2
    assert "There is no stage 'expert' (did you mean 'experts'?)" in err


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


def wrapped_disk_full() -> Exception:
    error = RuntimeError("writing failed")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device", "runs/x/file")
    return error


class SafetensorError(Exception):
    """Like that of safetensors, which has no errno."""


def failed_training(last_line: str) -> Exception:
    log = Path("runs/x/moe/train.log")
    return CommandFailedError("The job failed.", code=1, last_line=last_line, log=log)


def caused_by(cause: BaseException) -> Exception:
    error = L0MoEError("The model cannot be written.")
    error.__cause__ = cause
    return error


FULL = "No space left on the disk that holds {}; free some and run the same command to go on.\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), FULL.format("runs")),
        (SafetensorError("I/O error: quota (os error 122)"), FULL.format("runs")),
        (caused_by(OSError(errno.EDQUOT, "Disk quota exceeded", "runs/x/file")), FULL.format("runs/x/file")),
        (failed_training("OSError: [Errno 28] No space left on device"), FULL.format("runs/x/moe")),
        (caused_by(failed_training("OSError: No space left on device")), FULL.format("runs/x/moe")),
        (failed_training("ValueError: bad"), "The job failed.\n"),
        (caused_by(SafetensorError("I/O error (os error 2)")), "The model cannot be written.\n"),
    ],
    ids=["library", "library quota", "cause", "training", "training inside", "other job", "other error"],
)
def test_full_disks_in_disguise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    monkeypatch.setattr(run_local, "carry_out", raising(error))
    assert invoke("convert", str(write_recipe(tmp_path))) == (2, "", message)


def test_other_errors_of_safetensors_keep_their_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_local, "carry_out", raising(SafetensorError("I/O error (os error 280)")))
    result = CliRunner().invoke(cli.app, ["convert", str(write_recipe(tmp_path))])
    assert isinstance(result.exception, SafetensorError)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (L0MoEError("One sentence."), 2, "One sentence.\n"),
        (KeyboardInterrupt(), 130, "Stopped; run the same command to go on.\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x/file"),
            2,
            "No space left on the disk that holds runs/x/file; free some and run the same command to go on.\n",
        ),
        (
            wrapped_disk_full(),
            2,
            "No space left on the disk that holds runs/x/file; free some and run the same command to go on.\n",
        ),
    ],
    ids=["user error", "interrupt", "disk full", "disk full inside"],
)
def test_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    monkeypatch.setattr(run_local, "carry_out", raising(error))
    assert invoke("convert", str(write_recipe(tmp_path))) == (code, "", message)


def test_our_own_bugs_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_local, "carry_out", raising(KeyError("bug")))
    result = CliRunner().invoke(cli.app, ["convert", str(write_recipe(tmp_path))])
    assert result.exit_code == 1
    assert isinstance(result.exception, KeyError)


def test_disk_that_is_really_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*args: object, **kwargs: object) -> None:
        with open("/dev/full", "w") as file:
            file.write("x")

    monkeypatch.setattr(run_local, "carry_out", write)
    code, _, err = invoke("convert", str(write_recipe(tmp_path)))
    assert code == 2
    assert err.startswith("No space left on the disk that holds")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EROFS, "runs/x lies on a read-only file system; choose a folder that can be written"),
        (errno.EACCES, "runs/x may not be used by this user; change its permissions"),
        (errno.EIO, "runs/x could not be read or written by the disk"),
        (errno.EFBIG, "runs/x grew beyond what the file system or `ulimit -f` allows"),
        (errno.ESTALE, "runs/x is gone from the network file system"),
        (errno.EMFILE, "raise `ulimit -n`"),
        (errno.EXDEV, f"runs/x could not be used ({os.strerror(errno.EXDEV)})"),
    ],
)
def test_every_error_of_the_system_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    monkeypatch.setattr(run_local, "carry_out", raising(OSError(number, os.strerror(number), "runs/x")))
    code, out, err = invoke("convert", str(write_recipe(tmp_path)))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_errors_of_the_system_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(write_recipe(tmp_path))
    for error, words in (
        (OSError("Can't load\nthe tokenizer"), "Can't load the tokenizer.\n"),
        (OSError(errno.EIO, "I/O error"), "runs could not be read or written by the disk"),
    ):
        monkeypatch.setattr(run_local, "carry_out", raising(error))
        code, _, err = invoke("convert", file)
        assert (code, err.count("\n")) == (2, 1)
        assert err.startswith(words)
    monkeypatch.setattr(run_local, "carry_out", raising(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    assert CliRunner().invoke(cli.app, ["convert", file]).exit_code == 1  # typer's own way, without a word


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ("a_file", "has a file in its path where a folder must be"),
        ("a_file/below", "has a file in its path where a folder must be"),
        ("/dev/null/x", "has a file in its path where a folder must be"),
        ("x" * 300, "is a longer name than the file system takes"),
        ("y/" * 3000, "is a longer name than the file system takes"),
        ("a\nb", "--runs-dir 'a\\nb': a text may not hold the character '\\n'"),
        ("a\udcffb", "may not hold the character '\\udcff'"),
    ],
    ids=lambda value: value[:20].encode("unicode_escape").decode(),
)
def test_places_that_cannot_hold_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("")
    recipe = write_recipe(tmp_path, model__path=str(write_model(tmp_path / "model")))
    for command in (("convert",), ("assemble",)):
        code, out, err = invoke(*command, str(recipe), "--runs-dir", runs)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert words in err


def test_a_log_on_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's own words may not have reached its log then."""
    log = tmp_path / "train.log"
    error = CommandFailedError("The job failed: frozen runpy, li.", code=1, last_line="li", log=log)
    monkeypatch.setattr(run_local, "carry_out", raising(caused_by(error)))
    recipe = str(write_recipe(tmp_path))
    assert invoke("convert", recipe)[2] == "The model cannot be written.\n"
    monkeypatch.setattr(errors, "_free_bytes", lambda folder: 4096)
    assert invoke("convert", recipe)[2].startswith(
        f"The model cannot be written. The disk that holds {tmp_path} is full, which may be the cause and may have cut"
    )


def test_plan_is_bounded(tmp_path: Path) -> None:
    assert commands.MOST_GPUS == MOST_PROCESSES
    code, _, err = invoke("plan", str(write_recipe(tmp_path)), "--gpus", "100000000")
    assert code == 2
    assert "131072" in err


def test_the_command_leaves_out_what_changes_numbers(tmp_path: Path) -> None:
    """In a process of its own: the environment is changed in place."""
    command = [sys.executable, "-m", "megatron_l0moe", "--version"]
    variables = {**os.environ, "NVIDIA_TF32_OVERRIDE": "1", "RANK": "1", "WORLD_SIZE": "2"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
    assert done.stderr == "Left out of the environment, since it changes numbers: NVIDIA_TF32_OVERRIDE.\n"

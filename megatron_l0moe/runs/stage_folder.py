"""What a stage leaves behind: its files, then `manifest.json`, then the marker `DONE`, in this order.

A stage counts as done only when its marker is there, so a folder without one is half-written whatever else it
holds. The marker names the settings it was made with: another recipe's result is refused, never reused. The manifest
names every file with its size and sha256, by which it can be compared later, and the commit that the package ran from.
A shared file system may show late what another node wrote a moment ago, so markers of other stages are waited for.
No torch.
"""

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs import digests
from megatron_l0moe.runtime.json_files import read_json

logger = logging.getLogger(__name__)

HERE = Path(__file__).resolve()


def commit() -> str | None:
    """Return the commit of the source tree, with `+changes` when it was edited; None for an installed wheel."""
    head = _git("rev-parse", "HEAD") if _is_tracked() else None
    if head is None:
        return None
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return head.decode().strip() + ("+changes" if changes else "")


def changes() -> bytes:
    """Return the difference to the commit as git words it, in whatever encoding the files have; empty for a wheel."""
    if not _is_tracked():
        return b""
    return _git("diff", "HEAD", "--no-ext-diff", "--no-color") or b""


def untracked() -> list[str]:
    """Return the files of the tree that git neither tracks nor ignores, relative to its top; none for a wheel."""
    if not _is_tracked():
        return []
    listed = _git("ls-files", "--others", "--exclude-standard", "--full-name", "-z", ":/") or b""
    return [name.decode(errors="replace") for name in listed.split(b"\0") if name]


def _is_tracked() -> bool:
    """Say whether this file is of the tree around it: a wheel may lie inside somebody else's."""
    return _git("ls-files", "--error-unmatch", HERE.name) is not None


def _git(*words: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(HERE.parent), *words], capture_output=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


MARKER = "DONE"
MANIFEST = "manifest.json"
STARTED = "config_hash"
"""Written when a stage that can be resumed starts; names the settings that its checkpoints belong to."""
WORK = "work"
"""Folder inside a stage's for what an interrupted run goes on from; removed when the stage is done, never listed."""
CHANGES_AFTERWARDS = ("verdict", "attempts.jsonl", "stop", "stopped", "README.md")
"""Written after the manifest, by a batch job or with the measured numbers; never listed or compared."""
CHECKSUM = "checksum"
"""Key of a JSON file of ours that holds the sha256 of all the rest."""
RECORDED_PACKAGES = (
    "megatron-l0moe",
    "megatron-core",
    "torch",
    "transformers",
    "numpy",
    "datatrove",
    "FlagEmbedding",
    "faiss-cpu",
    "faiss-gpu",
    "transformer-engine",
    "lm-eval",
)

Restart = Literal["clear", "resume", "own"]
"""What becomes of an unfinished stage's folder: it is emptied; or its checkpoints are used, and work that was started
with other settings is refused; or the stage itself goes on from what it keeps in `work/`, or clears that."""


@dataclass(frozen=True)
class StageFolder:
    """One stage of one run: where it writes, with which settings, and from which finished stages."""

    name: str
    folder: Path
    config_hash: str
    inputs: tuple[Path, ...] = ()
    """Folders of the finished stages whose files are read."""
    beside: tuple[Path, ...] = ()
    """Outputs that lie outside of the folder."""


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON so that a reader sees the old file or the new one, never half of it."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` as a whole; see `whole`."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give the file to write into, of another name in the same folder; after the block it takes the place of `path`.

    A reader sees the old file or the new one, never half of it, and an error leaves the old one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object with a checksum of itself, which `unsealed` compares."""
    return {**values, CHECKSUM: _checksum(values)}


def unsealed(values: dict[str, Any], path: Path, mend: str) -> dict[str, Any]:
    """Return a JSON object without its checksum; one that was written before there were checksums passes.

    Raises:
        L0MoEError: the object is not the one that the checksum was made of.
    """
    rest = {key: value for key, value in values.items() if key != CHECKSUM}
    if CHECKSUM in values and values[CHECKSUM] != _checksum(rest):
        raise L0MoEError(f"{path} was changed after it was written (its checksum differs); {mend}.")
    return rest


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file as 64 hex digits."""
    return digests.compute(path)


def is_done(stage: StageFolder) -> bool:
    """Say whether the stage is finished, with these settings and from these inputs.

    Raises:
        L0MoEError: the stage is finished, but with other settings, or its inputs were made anew since.
    """
    if not has_marker(stage):
        return False
    manifest = read_manifest(stage.folder)
    if manifest.get("config_hash", stage.config_hash) != stage.config_hash:
        raise L0MoEError(
            f"{stage.folder / MANIFEST} is not the one that the stage wrote, as it names other settings than {MARKER}; "
            f"restore it, or remove {stage.folder} to make it anew."
        )
    recorded = _recorded_inputs(manifest)
    for name, digest in input_digests(stage).items():
        if recorded.get(name) != digest:
            raise L0MoEError(
                f"{stage.folder} was made from an earlier {name} than the one there now; remove {stage.folder} "
                "to make it anew."
            )
    return True


def has_marker(stage: StageFolder) -> bool:
    """Say whether the stage was finished with these settings, whatever became of its inputs since.

    Raises:
        L0MoEError: the stage is finished, but with other settings.
    """
    marker = stage.folder / MARKER
    if not marker.is_file():
        return False
    found = marker.read_text(encoding="utf-8").strip()
    if found != stage.config_hash:
        raise L0MoEError(
            f"{stage.folder} was made with other settings ({found}) than this recipe gives the stage "
            f"{stage.name} ({stage.config_hash}); give the recipe another name, or remove {stage.folder}."
        )
    return True


def finish(
    stage: StageFolder,
    command: list[str],
    extra: dict[str, object],
    *,
    model: dict[str, object] | None = None,
    unread: Callable[[str], bool] = lambda name: False,
) -> None:
    """Write the manifest, then the marker; after this the stage is done.

    Args:
        command: what was run, word by word.
        extra: the numbers that the stage returned.
        model: sizes and sha256 of the dense model's files, of a stage that records them.
        unread: says of an output, by its name in the folder, that no stage reads it; it gets no sha256.
    """
    files = _outputs(stage)
    manifest: dict[str, object] = {
        "stage": stage.name,
        "config_hash": stage.config_hash,
        "inputs": input_digests(stage),
        "outputs": {name: path.stat().st_size for name, path in files.items()},
        "sha256": digests.of({name: path for name, path in files.items() if not unread(name)}),
        **({"model": model} if model else {}),
        "command": command,
        "commit": commit(),
        "versions": versions(),
        "machine": {"host": socket.gethostname(), "platform": platform.platform(), "cpus": os.cpu_count()},
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "numbers": extra,
    }
    write_json(stage.folder / MANIFEST, sealed(manifest))
    write_text(stage.folder / MARKER, stage.config_hash + "\n")


def begin(stage: StageFolder, restart: Restart) -> None:
    """Make the folder ready for a run of the stage: empty it, or keep what the restart rule keeps.

    Raises:
        L0MoEError: the folder holds resumable work that was started with other settings or inputs.
    """
    assert not (stage.folder / MARKER).exists(), f"{stage.folder} is finished"
    if restart == "clear" or (restart == "own" and not (stage.folder / WORK).is_dir()):
        clear(stage)
    if restart != "resume":
        stage.folder.mkdir(parents=True, exist_ok=True)
        return
    started = stage.folder / STARTED
    check_started(stage)
    if not started.is_file():
        if stage.folder.is_dir() and any(stage.folder.iterdir()):
            raise L0MoEError(
                f"{stage.folder} holds files that this command did not start, such as a training run by hand; move "
                "them away, or remove the folder."
            )
        stage.folder.mkdir(parents=True, exist_ok=True)
        write_text(started, _identity(stage) + "\n")


def check_started(stage: StageFolder) -> None:
    """Check that unfinished work of a stage that can be resumed is this recipe's; its inputs must be finished."""
    started = stage.folder / STARTED
    if started.is_file() and started.read_text(encoding="utf-8").strip() != _identity(stage):
        raise L0MoEError(
            f"{stage.folder} holds unfinished work that was started with other settings or other inputs than this "
            f"recipe gives the stage {stage.name}; give the recipe another name, or remove {stage.folder}."
        )


def clear(stage: StageFolder) -> None:
    """Empty a half-written stage folder; a finished one is never touched."""
    assert not (stage.folder / MARKER).exists(), f"{stage.folder} is finished"
    if not stage.folder.is_dir():
        return
    for entry in stage.folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def drop_work(stage: StageFolder) -> None:
    """Remove what a stage keeps for going on after an interruption; called when it is done."""
    shutil.rmtree(stage.folder / WORK, ignore_errors=True)


def input_digests(stage: StageFolder) -> dict[str, str]:
    """Return the sha256 of each input stage's manifest, keyed by the input's path inside the run."""
    digests = {}
    for folder in stage.inputs:
        manifest = folder / MANIFEST
        if not (folder / MARKER).is_file() or not manifest.is_file():
            raise L0MoEError(
                f"The stage {stage.name} needs {folder}, which is not finished; run the stage that makes it first, "
                "or the whole chain with `l0moe run`."
            )
        digests[_short(folder)] = sha256_file(manifest)
    return digests


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a finished stage's manifest, or an empty mapping when there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    mend = f"restore it, or remove {folder} to make it anew"
    return unsealed(read_json(path, mend), path, mend)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide the numbers, those that are installed."""
    found = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _identity(stage: StageFolder) -> str:
    text = json.dumps([stage.config_hash, input_digests(stage)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _recorded_inputs(manifest: dict[str, Any]) -> dict[str, object]:
    recorded = manifest.get("inputs", {})
    return recorded if isinstance(recorded, dict) else {}


def _outputs(stage: StageFolder) -> dict[str, Path]:
    """Return the files that the stage wrote, by their name relative to its folder."""
    folder, work = stage.folder, stage.folder / WORK
    left_out = (MARKER, MANIFEST, *CHANGES_AFTERWARDS)
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name not in left_out and work not in path.parents
    )
    named = {path.relative_to(folder).as_posix(): path for path in files}
    return named | {os.path.relpath(path, folder): path for path in stage.beside if path.is_file()}


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _short(folder: Path) -> str:
    """Name a stage folder inside its run: `curate`, `experts/003`."""
    return f"{folder.parent.name}/{folder.name}" if folder.name.isdigit() else folder.name


@dataclass(frozen=True)
class Recorded:
    """Files of one folder."""

    folder: Path
    sizes: Mapping[str, int]
    """Bytes by name."""
    sha256: Mapping[str, str]
    """The sha256 of the same files; those that an earlier version wrote, and those that no stage reads, have none."""

    def only(self, names: Iterator[str]) -> "Recorded":
        """Return some of the files."""
        kept = set(names)
        return Recorded(
            self.folder,
            {name: size for name, size in self.sizes.items() if name in kept},
            {name: digest for name, digest in self.sha256.items() if name in kept},
        )

    def begin(self) -> None:
        """Begin to read the files whose size is right, in threads."""
        for name in self.sha256:
            if self._size_problem(name) is None:
                digests.begin(self.folder / name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (name, problem) of each file that is not as recorded, sizes before contents."""
        wrong = {name: problem for name in self.sizes if (problem := self._size_problem(name)) is not None}
        yield from wrong.items()
        self.begin()
        for name, digest in self.sha256.items():
            if name not in wrong and digests.begin(self.folder / name).result() != digest:
                yield name, "is not the file that was written (its sha256 differs)"

    def _size_problem(self, name: str) -> str | None:
        file = self.folder / name
        if not file.is_file():
            return "is missing"
        found = file.stat().st_size
        return None if found == self.sizes[name] else f"has {found} bytes instead of {self.sizes[name]}"


def recorded_outputs(folder: Path) -> Recorded:
    """Return the outputs of a finished stage as its manifest has them; none where there is no manifest."""
    found = _recorded(folder, read_manifest(folder), "outputs", folder / MANIFEST)
    return found.only(name for name in found.sizes if Path(name).name not in CHANGES_AFTERWARDS)


def recorded_model(folder: Path) -> Recorded | None:
    """Return the dense model's files as a stage recorded them; None where it did not."""
    model = read_manifest(folder).get("model")
    if model is None:
        return None
    if not isinstance(model, dict) or not isinstance(model.get("path"), str):
        raise _damaged(folder / MANIFEST)
    return _recorded(Path(model["path"]), model, "sizes", folder / MANIFEST)


def _recorded(folder: Path, values: dict[str, Any], sizes_key: str, file: Path) -> Recorded:
    sizes, sha256 = values.get(sizes_key, {}), values.get("sha256", {})
    if (
        not isinstance(sizes, dict)
        or not isinstance(sha256, dict)
        or not all(type(size) is int for size in sizes.values())
        or not all(isinstance(digest, str) for digest in sha256.values())
        or not sha256.keys() <= sizes.keys()
    ):
        raise _damaged(file)
    return Recorded(folder, sizes, sha256)


def _damaged(file: Path) -> L0MoEError:
    return L0MoEError(
        f"{file} does not list files by size and sha256; restore it, or remove {file.parent} to make it anew."
    )


LATE_SECONDS = 90.0
"""NFS remembers for up to 60 s that a file was not there (acdirmax, nfs(5))."""
INTERVAL_SECONDS = 1.0


def wait_for_inputs(stage: StageFolder) -> None:
    """Wait, for a bounded time, until the markers of the input stages can be seen; whoever needs them says the rest."""
    deadline = time.monotonic() + LATE_SECONDS
    told = False
    while missing := [folder for folder in stage.inputs if not _is_there(folder)]:
        if time.monotonic() > deadline:
            return
        if not told:
            logger.info("Waiting up to %.0f s for %s to be finished.", LATE_SECONDS, missing[0])
            told = True
        time.sleep(INTERVAL_SECONDS)
        for folder in missing:
            if folder.is_dir():
                os.listdir(folder)  # makes a client of NFS ask again


def _is_there(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (MARKER, MANIFEST))

"""Units: what a step is cut into, and the record that tells a whole unit from one that was killed halfway.

A unit writes its files under hidden names, renames them, and writes `00012.json` last: sizes and checksums of the
files, and a digest of what the unit was asked to do. A unit counts as done only if all of that still fits, whatever a
completion marker says. How a step is cut does not depend on the tasks that do it, so neither does a byte of the result.
In the folder of a stage that is being made, what an interrupted run left is used where it still fits.

Shape letters: U = units, n = items of all units (documents or shards).
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_l0moe.errors import CorpusChangedError, L0MoEError
from megatron_l0moe.runs.stage_folder import WORK, sha256_file, write_json, write_text

VERSION = 1
"""The version of the files in the work folder."""
IDENTITY = "identity"
OUTPUTS = (
    "iter_*", "*.ccm.*", "heldout.jsonl", "clusters.npz", "ccm.json", "quarantine.jsonl", "summary.json",
)  # fmt: skip
"""What the stage makes beside its work folder."""


@dataclass(frozen=True)
class Workspace:
    """A stage folder and what decides its content."""

    out: Path
    """Absolute."""
    identity: str

    @classmethod
    def begin(cls, out: Path, decides: dict[str, Any]) -> "Workspace":
        """Go on in ``out`` if the work there is of the same settings and corpus, else clear it.

        Args:
            out: folder of the stage.
            decides: settings and the state of the corpus.
        """
        text = json.dumps([VERSION, decides], sort_keys=True)
        workspace = cls(out.resolve(), hashlib.sha256(text.encode()).hexdigest())
        if workspace._found() != workspace.identity:
            workspace.clear()
            write_text(workspace.work / IDENTITY, workspace.identity)
        workspace._drop_partial_files()
        return workspace

    @property
    def work(self) -> Path:
        """Folder for what is needed until the stage is done."""
        return self.out / WORK

    def clear(self) -> None:
        """Remove everything that the stage made, and nothing else."""
        (self.work / IDENTITY).unlink(missing_ok=True)  # first: what is left if this is killed is not used
        shutil.rmtree(self.work, ignore_errors=True)
        for pattern in OUTPUTS:
            for path in self.out.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def check_current(self) -> None:
        """Stop a task whose driver is gone and whose folder another one has taken over.

        Raises:
            L0MoEError: the folder is used for other settings or another corpus now.
        """
        if self._found() != self.identity:
            raise L0MoEError(
                f"{self.work} was begun anew by another command; this task ends without a result."
            )

    def refuse_later(self, error: CorpusChangedError) -> None:
        """Make sure that the next start begins anew, although the corpus may look the same."""
        (self.work / IDENTITY).unlink(missing_ok=True)

    def _drop_partial_files(self) -> None:
        """Remove what a killed driver was writing: the hidden names of `manifest.write_text` are never the same."""
        for path in self.out.glob(".*"):
            if path.is_file() and any(fnmatch.fnmatchcase(path.name, f".{name}*") for name in OUTPUTS):
                path.unlink()

    def _found(self) -> str:
        file = self.work / IDENTITY
        return file.read_text(encoding="utf-8") if file.is_file() else ""


UNIT = np.dtype([("start", "<i8"), ("stop", "<i8"), ("iteration", "<i4"), ("shard", "<i4"), ("limit", "<i8")])
"""Items start:stop; the others are for tokenising: iteration, its running number of shards, tokens of a document."""
CHECKING_THREADS = 4
"""Checksums that are computed at a time; hashing does not hold Python's lock."""

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class UnitPlan:
    """What the units of a step have to do."""

    items: Ids
    """[n] document or shard numbers."""
    units: npt.NDArray[np.void]
    """[U] of ``UNIT``."""

    @classmethod
    def of(
        cls, items: Ids, ends: Ids, *, iteration: int = 0, first_shard: int = 0, limit: int = 0
    ) -> "UnitPlan":
        """Return a plan whose unit u does the items between ends[u - 1] and ends[u]."""
        units = np.zeros(len(ends), dtype=UNIT)
        units["start"], units["stop"] = np.concatenate([[0], ends[:-1]]) if len(ends) else [], ends
        units["iteration"], units["limit"] = iteration, limit
        units["shard"] = first_shard + np.arange(len(ends))
        return cls(np.asarray(items, dtype=np.int64), units)

    @classmethod
    def joined(cls, plans: "Sequence[UnitPlan]") -> "UnitPlan":
        """Return the units of several plans as one."""
        units = np.concatenate([plan.units for plan in plans])
        offsets = np.cumsum([0, *(len(plan.items) for plan in plans[:-1])])
        shift = np.repeat(offsets, [len(plan) for plan in plans])
        units["start"] += shift
        units["stop"] += shift
        return cls(np.concatenate([plan.items for plan in plans]), units)

    def __len__(self) -> int:
        return len(self.units)

    def items_of(self, unit: int) -> Ids:
        """Return the items of one unit."""
        return np.asarray(self.items[self.units["start"][unit] : self.units["stop"][unit]])

    def digest(self, unit: int) -> str:
        """Return a hash of everything that the unit has to do."""
        place = [int(self.units[name][unit]) for name in ("iteration", "shard", "limit")]
        return hashlib.sha256(json.dumps(place).encode() + self.items_of(unit).tobytes()).hexdigest()[:32]

    def save(self, folder: Path) -> None:
        """Write the plan for the tasks."""
        write_array(folder / "items.npy", self.items)
        write_array(folder / "units.npy", self.units)

    @classmethod
    def load(cls, folder: Path) -> "UnitPlan":
        """Return what `save` wrote; the items stay on disk."""
        return cls(np.load(folder / "items.npy", mmap_mode="r"), np.load(folder / "units.npy"))


@dataclass(frozen=True)
class UnitRecord:
    """What a finished unit says of itself."""

    plan: str
    """Digest of what it was asked to do."""
    files: dict[str, tuple[int, str]]
    """Size and sha256 of each file, by its path relative to the stage's folder."""
    content: dict[str, Any]
    """What the step wants to tell."""


def cut_at_shards(shards: npt.NDArray[Any], weights: npt.NDArray[Any], size: float) -> Ids:
    """Cut items into consecutive groups that end where a shard ends, each but the last of at least ``size``.

    A shard is read by one unit only, since compressed ones can be read from their start only.

    Args:
        shards: [n], ascending: where each item lies.
        weights: [n], what each counts for ``size``.
        size: of a group.

    Returns:
        int64 [U], the end of each group.
    """
    if not len(shards):
        return np.empty(0, dtype=np.int64)
    last = np.append(np.flatnonzero(np.diff(shards)), len(shards) - 1)
    ends, start = [], 0.0
    for item, total in zip(last.tolist(), np.cumsum(weights)[last].tolist(), strict=True):
        if total - start >= size:
            ends.append(item + 1)
            start = total
    if not ends or ends[-1] < len(shards):
        ends.append(len(shards))
    return np.array(ends, dtype=np.int64)


def record_file(folder: Path, unit: int) -> Path:
    """Return the record of a unit."""
    return folder / f"{unit:05d}.json"


def write_record(
    root: Path, folder: Path, unit: int, plan: str, files: Sequence[Path], content: dict[str, Any]
) -> None:
    """Write a unit's record, after which it is done; the files are in place already."""
    described = {
        file.relative_to(root).as_posix(): (file.stat().st_size, sha256_file(file)) for file in files
    }
    write_json(record_file(folder, unit), {"plan": plan, "files": described, "content": content})


def read_record(root: Path, folder: Path, unit: int, plan: str) -> UnitRecord | None:
    """Return the record of a unit, or None where it is missing, for another plan, or does not fit its files."""
    try:
        raw = json.loads(record_file(folder, unit).read_text(encoding="utf-8"))
        record = UnitRecord(
            raw["plan"], {name: tuple(file) for name, file in raw["files"].items()}, raw["content"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = record.plan == plan and all(
        _size(root / name) == size and sha256_file(root / name) == digest
        for name, (size, digest) in record.files.items()
    )
    return record if whole else None


def read_records(root: Path, folder: Path, plan: UnitPlan, units: Sequence[int]) -> list[UnitRecord | None]:
    """Read several records, some at a time."""

    def read(unit: int) -> UnitRecord | None:
        return read_record(root, folder, unit, plan.digest(unit))

    with ThreadPoolExecutor(CHECKING_THREADS) as threads:
        return list(threads.map(read, units))


@contextlib.contextmanager
def published(*files: Path, folder: Path) -> Iterator[tuple[Path, ...]]:
    """Yield a hidden name in ``folder`` for each file; they get their own names when the block ends well.

    What a kill leaves in ``folder`` is nobody's: it has to be one that is removed in the end.
    """
    token = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    hidden = tuple(folder / f".{token}.{file.name}" for file in files)
    try:
        yield hidden
        for partial, file in zip(hidden, files, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.replace(file)
    finally:
        for partial in hidden:
            partial.unlink(missing_ok=True)


def write_array(file: Path, array: npt.NDArray[Any]) -> None:
    """Write a .npy file that is whole or not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with published(file, folder=file.parent) as (partial,), partial.open("wb") as stream:
        np.save(stream, array)


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1

"""A whole run compared with its manifests: every output, the manifests of the inputs, the dense model. No torch."""

from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.launch.stages import STAGE_NAMES
from megatron_l0moe.runs.stage_folder import (
    MANIFEST,
    MARKER,
    Recorded,
    read_manifest,
    recorded_model,
    recorded_outputs,
    sha256_file,
)


@dataclass
class Checked:
    """One line of the table."""

    name: str
    files: int = 0
    size: int = 0
    """Bytes as recorded."""
    by_size: int = 0
    """Files without a recorded sha256: an earlier version's, or training checkpoints that no stage reads."""
    problems: list[str] = field(default_factory=list)


def verify_run(run: Path) -> list[Checked]:
    """Compare the finished stages of a run, and the dense model where it is recorded.

    Manifests are read first: what they say of each other costs nothing. Then all files are read, several at a time.
    """
    return [*(_stage(run, folder) for folder in stage_folders(run)), *_model(run)]


def stage_folders(run: Path) -> list[Path]:
    """Return the folders of finished stages, in the order of the chain."""
    places = [folder for name in STAGE_NAMES for folder in (run / name, *sorted((run / name).glob("[0-9]*")))]
    return [folder for folder in places if (folder / MARKER).is_file()]


def table(checked: list[Checked]) -> Table:
    """Return the table of what was compared."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("what", no_wrap=True)
    for name in ("files", "GB", "by size only"):
        shown.add_column(name, justify="right")
    shown.add_column("as recorded")
    for one in checked:
        by_size = f"{one.by_size:,}" if one.by_size else ""
        wrong = f"{len(one.problems)} WRONG" if one.problems else "yes"
        shown.add_row(one.name, f"{one.files:,}", f"{one.size / 1e9:,.3f}", by_size, wrong)
    return shown


def _stage(run: Path, folder: Path) -> Checked:
    checked = Checked(folder.relative_to(run).as_posix())
    try:
        manifest = read_manifest(folder)
        recorded = recorded_outputs(folder)
    except L0MoEError as damaged:
        checked.problems.append(str(damaged))
        return checked
    if not manifest:
        checked.problems.append(f"{folder / MANIFEST} is missing; restore it, or remove {folder}.")
        return checked
    marker = (folder / MARKER).read_text(encoding="utf-8", errors="replace").strip()
    if marker != manifest.get("config_hash"):
        checked.problems.append(f"{folder / MARKER} names other settings than {MANIFEST} beside it.")
    inputs = manifest.get("inputs")
    for name, digest in (inputs if isinstance(inputs, dict) else {}).items():
        source = run / name / MANIFEST
        if not source.is_file() or sha256_file(source) != digest:
            checked.problems.append(f"{source} is not the one that {folder} was made from.")
    return _compare(checked, recorded)


def _model(run: Path) -> list[Checked]:
    """Compare the dense model with the first record of it."""
    for folder in (run / "convert", run / "curate"):
        try:
            recorded = recorded_model(folder) if (folder / MARKER).is_file() else None
        except L0MoEError:  # said of the stage itself
            continue
        if recorded is not None:
            return [_compare(Checked("dense model"), recorded)]
    return []


def _compare(checked: Checked, recorded: Recorded) -> Checked:
    checked.files, checked.size = len(recorded.sizes), sum(recorded.sizes.values())
    checked.by_size = len(recorded.sizes) - len(recorded.sha256)
    checked.problems += [f"{recorded.folder / name} {problem}." for name, problem in recorded.problems()]
    return checked

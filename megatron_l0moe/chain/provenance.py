"""What a stage reads is what the stage before wrote: its inputs are compared with the manifests of those who made them.

The sizes of all files that the chain's table names are compared, and their sha256. The token files and arrays of
`curate` are not among them: their sha256 lie in the headers of the indexes, and the training jobs compare them. So it
is with the files of the dense model, whose sha256 `convert` and `curate` record; weights are read for it by `evaluate`
only, which computes with them. `l0moe verify` compares a whole run: every output, the manifests of the inputs, the
dense model. No torch.
"""

import contextlib
import fnmatch
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from megatron_l0moe.chain.attempts import saved_step
from megatron_l0moe.conversion.companions import GENERATION_CONFIG, TOKENIZER_FILES
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.index.index import load_header
from megatron_l0moe.runs import digests
from megatron_l0moe.runs.stage_folder import (
    MANIFEST,
    MARKER,
    Recorded,
    StageFolder,
    finish,
    read_manifest,
    recorded_model,
    recorded_outputs,
    sha256_file,
)
from megatron_l0moe.runs.stages import STAGE_NAMES, Run, folders, spec_of, stage_command

logger = logging.getLogger(__name__)


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


TRACKER = "checkpoints/latest_checkpointed_iteration.txt"
WEIGHTS = "*.safetensors"
MODEL_FILES = ("config.json", GENERATION_CONFIG, *TOKENIZER_FILES, "*.safetensors.index.json", WEIGHTS)
"""Files of the dense model's folder that are compared."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
"""One of them is what `curate` tokenises with: the first that there is."""
_TOLD: list[str] = []
"""Folders without sha256 that the log has named; it does so once."""


@contextlib.contextmanager
def checked(run: Run, stage: StageFolder) -> Iterator[None]:
    """Compare what a stage reads, before or beside the work of the `with` block; see `check`."""
    if not spec_of(stage.name, run.recipe.method).reads_quickly:
        check(run, stage)
        yield
        return
    if run.verify:
        for recorded, _ in _inputs(run, stage):
            recorded.begin()
    try:
        with digests.following():
            yield
    except Exception as error:
        try:
            check(run, stage)  # says more than what the damage led to
        except L0MoEError as damage:
            raise damage from error
        digests.stop()
        raise
    except BaseException:
        digests.stop()
        raise
    check(run, stage)


def check(run: Run, stage: StageFolder) -> None:
    """Compare what a stage reads with what the stages before recorded, unless the run is not to be verified."""
    if not run.verify:
        return
    older = []
    for recorded, mend in _inputs(run, stage):
        for name, problem in recorded.problems():
            raise L0MoEError(f"{recorded.folder / name} {problem}; {mend}, or use --no-verify.")
        if recorded.sizes and not recorded.sha256:
            older.append(str(recorded.folder))
    if older and not _TOLD:
        _TOLD.extend(older)
        logger.info(
            "Compared by size only, as an earlier version recorded no sha256: the files of %s.",
            ", ".join(older),
        )
    _check_tokenizer(run, stage)
    if "checkpoints/*" in spec_of(stage.name, run.recipe.method).reads.get("moe", ()):
        _check_last_step(run)


def finish_stage(run: Run, stage: StageFolder, numbers: dict[str, object]) -> None:
    """Write a stage's manifest, with the dense model's files where it records them, and its marker."""
    model = None
    if stage.name in ("convert", "curate"):
        weights = numbers.get("weights", [])
        model = _model_record(Path(run.recipe.model.path), weights if isinstance(weights, list) else [])
    step = saved_step(stage.folder)
    finish(
        stage,
        stage_command(run, stage.name),
        numbers,
        model=model,
        unread=lambda name: _is_of_another_step(name, step),
    )


def _inputs(run: Run, stage: StageFolder) -> Iterator[tuple[Recorded, str]]:
    """Yield the recorded files that a stage reads, and what helps where they differ."""
    model = _recorded_model(run, stage)
    if model is not None:
        yield model, "put the file back, or give the recipe another name to use another model"
    spec = spec_of(stage.name, run.recipe.method)
    for name in spec.inputs:
        for folder in folders(run, name):
            files = recorded_outputs(folder)
            patterns = spec.reads.get(name, ())
            read = files.only(
                file for file in files.sizes if any(fnmatch.fnmatch(file, pattern) for pattern in patterns)
            )
            step = saved_step(folder)
            read = read.only(file for file in read.sizes if not _is_of_another_step(file, step))
            yield read, f"restore it, or remove {folder} to make it anew"


def _is_of_another_step(name: str, step: int) -> bool:
    """Say whether an output is of a training checkpoint that no stage reads, and that may be removed."""
    used = name == TRACKER or name.startswith(f"checkpoints/iter_{step:07d}/")
    return name.startswith("checkpoints/") and not used


def _recorded_model(run: Run, stage: StageFolder) -> Recorded | None:
    """Return the dense model's files that a stage has to find unchanged, in the folder that the recipe names now."""
    place = Path(run.recipe.model.path)
    makers = [run.stage_folder(name) for name in ("convert", "curate") if name != stage.name]
    for folder in makers:
        recorded = recorded_model(folder) if (folder / MARKER).is_file() else None
        if recorded is None:
            continue
        recorded = Recorded(place, recorded.sizes, recorded.sha256)
        for name in _model_files(place):
            if name not in recorded.sizes:
                raise L0MoEError(
                    f"{place / name} was not there when {folder} was made of this model; remove it, or give the "
                    "recipe another name to use another model, or use --no-verify."
                )
        if stage.name != "evaluate":
            small = {name: digest for name, digest in recorded.sha256.items() if not _is_weights(name)}
            recorded = Recorded(place, recorded.sizes, small)
        return recorded
    return None


def _model_record(folder: Path, weights: list[str]) -> dict[str, object]:
    """Return sizes of the dense model's files, and sha256 of all small ones and of the weights that were read."""
    files = _model_files(folder)
    hashed = {name: file for name, file in files.items() if not _is_weights(name) or name in weights}
    return {
        "path": str(folder),
        "sizes": {name: file.stat().st_size for name, file in files.items()},
        "sha256": digests.of(hashed),
    }


def _model_files(folder: Path) -> dict[str, Path]:
    found = {file.name: file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file()}
    return dict(sorted(found.items()))


def _is_weights(name: str) -> bool:
    return fnmatch.fnmatch(name, WEIGHTS)


def _check_tokenizer(run: Run, stage: StageFolder) -> None:
    """Compare the tokenizer with the sets', also where no manifest records it."""
    curate, model = run.stage_folder("curate"), Path(run.recipe.model.path)
    if stage.name == "curate" or not (curate / MARKER).is_file() or not (curate / "moe.ccm.json").is_file():
        return
    file = next((model / name for name in TOKENIZERS if (model / name).is_file()), None)
    if file is not None and digests.begin(file).result() != load_header(curate / "moe").tokenizer_sha256:
        raise L0MoEError(
            f"{file} is not the tokenizer that {curate} was made with (its sha256 differs); put the file back, or give "
            "the recipe another name to use another model, or use --no-verify."
        )


def _check_last_step(run: Run) -> None:
    """Refuse a training whose newest checkpoint is not that of its last step."""
    folder = run.stage_folder("moe")
    steps, step = run.recipe.moe_steps, saved_step(folder)
    if read_manifest(folder) and (folder / "checkpoints").is_dir() and step != steps:
        raise L0MoEError(
            f"{folder / TRACKER} names step {step}, but the training ended with step {steps}; write {steps} into it, "
            f"remove {folder} to train anew, or use --no-verify."
        )

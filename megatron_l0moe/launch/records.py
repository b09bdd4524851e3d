"""What a training job was started from, written before its first step: recipe, code, packages, command, machine.

`FOLDER/records/attempt_NNN/` holds

| file | what |
|---|---|
| recipe.yaml | the recipe with every default filled in |
| config_hash | of the settings that decide the stage's result, as in its manifest |
| commit | of the source tree, `+changes` when it was edited |
| diff.patch | those changes, only when there are any |
| packages.txt | every installed package with its version |
| command.txt | the command, for a shell |
| environment.json | host, working folder and the variables of `RECORDED_PREFIXES` |
| job.sbatch | the batch script, when Slurm runs the job |

No secret may get into these files: variables are recorded only when their prefix is known and neither their name nor
their value looks like one.
"""

import datetime
import importlib.metadata
import logging
import os
import platform
import re
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from megatron_l0moe.data import source_tree
from megatron_l0moe.data.manifest import versions, write_json, write_text
from megatron_l0moe.launch.stages import Run, config_hash

logger = logging.getLogger(__name__)

RECORDS = "records"
SBATCH_VARIABLE = "L0MOE_SBATCH_FILE"
"""Names the batch script of the job; set by the script itself."""
RECORDED_PREFIXES = (
    *("SLURM_", "NCCL_", "GLOO_", "UCX_", "FI_", "CUDA_", "NVIDIA_", "NVTE_"),
    *("TORCH_", "PYTORCH_", "TORCHELASTIC_", "OMP_", "MKL_", "L0MOE_"),
)
DIFF_LIMIT = 2**20
"""Bytes of diff.patch."""
_SECRET = r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|JWT"  # noqa: S105 - names, no value. SLURM_JWT lets one use the cluster
_SECRET_NAME = re.compile(_SECRET)
_SECRET_VALUE = re.compile(rf"(?i)(?:{_SECRET})\w*\s*[=:]|://[^/\s]*:[^/\s]*@")
"""SLURM_EXPORT_ENV holds what was given to --export, NAME=VALUE pairs included; addresses can hold a password."""
_SECRET_ASSIGNMENT = re.compile(rf"(?im)(\b\w*(?:{_SECRET})\w*=)(?:'[^']*'|\"[^\"]*\"|[^\s,'\"]+)")
_UNKNOWN_COMMIT = "unknown: the package was installed without its source tree, or git cannot be run here"


def write_records(run: Run, stage_folder: Path, command: Sequence[str], *, attempt: int) -> Path:
    """Write what this start of a training job consists of; returns the folder.

    Args:
        run: gives the recipe.
        stage_folder: of the stage, or of one expert.
        command: word by word, with `env NAME=VALUE ...` before it where the job has variables of its own.
        attempt: number of this start, from 1; a second call with the same number writes the files anew.
    """
    folder = stage_folder / RECORDS / f"attempt_{attempt:03d}"
    name = "experts" if stage_folder.name.isdigit() else stage_folder.name
    recipe = yaml.safe_dump(run.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_text(folder / "recipe.yaml", recipe)
    write_text(folder / "config_hash", config_hash(name, run.recipe) + "\n")
    write_text(folder / "commit", (source_tree.commit() or _UNKNOWN_COMMIT) + "\n")
    _write_changes(folder / "diff.patch", source_tree.changes(), source_tree.untracked())
    write_text(folder / "packages.txt", _packages())
    write_text(folder / "command.txt", shlex.join(command) + "\n")
    write_json(folder / "environment.json", _environment(os.environ))
    _copy_batch_script(os.environ.get(SBATCH_VARIABLE), folder / "job.sbatch")
    return folder


def next_attempt(stage_folder: Path) -> int:
    """Return the number after that of the last recorded start, 1 for the first."""
    numbers = [path.name.removeprefix("attempt_") for path in (stage_folder / RECORDS).glob("attempt_*")]
    return max((int(number) for number in numbers if number.isdigit()), default=0) + 1


def _write_changes(path: Path, changes: bytes, untracked: Sequence[str]) -> None:
    """Write the changes, cut at a whole line; files that git does not know are named, not copied."""
    notes = [f"# not in git, and not in this file: {name}" for name in untracked]
    if len(changes) > DIFF_LIMIT:
        notes.insert(0, f"# cut: {len(changes)} bytes of changes, of which the first {DIFF_LIMIT} are kept")
        changes = changes[: changes.rfind(b"\n", 0, DIFF_LIMIT) + 1]
    path.unlink(missing_ok=True)
    if changes or notes:
        path.write_bytes("".join(f"{note}\n" for note in notes).encode() + changes)


def _packages() -> str:
    found = {
        (distribution.metadata["Name"] or "?", distribution.version)
        for distribution in importlib.metadata.distributions()
    }
    lines = [f"{name}=={version}" for name, version in sorted(found, key=lambda pair: pair[0].lower())]
    return "\n".join([f"# Python {versions()['python']}", *lines]) + "\n"


def _environment(variables: Mapping[str, str]) -> dict[str, object]:
    known = {name: value for name, value in variables.items() if name.startswith(RECORDED_PREFIXES)}
    kept = {name: value for name, value in known.items() if not _is_secret(name, value)}
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": sys.executable,
        "working_folder": str(Path.cwd()),
        "variables": dict(sorted(kept.items())),
        "left_out": sorted(known.keys() - kept.keys()),
    }


def _is_secret(name: str, value: str) -> bool:
    return bool(_SECRET_NAME.search(name.upper()) or _SECRET_VALUE.search(value))


def _copy_batch_script(source: str | None, target: Path) -> None:
    if not source:
        return
    try:
        text = Path(source).read_text(encoding="utf-8", errors="replace")
    except OSError as error:  # a record that is missing must not cost the job its place in the queue
        logger.warning("The batch script %s cannot be recorded (%s).", source, error)
        text = f"# {source} could not be read: {error}\n"
    write_text(target, _SECRET_ASSIGNMENT.sub(r"\1***", text))

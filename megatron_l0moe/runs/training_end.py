"""How a training job ended before its last step: an exit code and small files in the stage's folder. No torch.

| file | who writes it | meaning |
|---|---|---|
| stop | anybody: a batch script, a person | save a checkpoint after the present step and end |
| stopped | the job | it did; holds the step of that checkpoint |
| failure.json | the job, or the phase that judges its attempts | do not simply start it again; holds the sentence |
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs.stage_folder import write_json
from megatron_l0moe.runtime.json_files import read_json

STOPPED = 75
"""Exit code of a job that ended before its last step because it was asked to; EX_TEMPFAIL of sysexits.h."""
STOP_FILE = "stop"
STOPPED_FILE = "stopped"
FAILURE_FILE = "failure.json"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a job must not simply be started again."""

    kind: Literal["nan", "crashes", "refused"]
    """nan: a loss or gradient that is no finite number. crashes: attempts that got nowhere. refused: a sentence for
    the user, who may have mended it by the next start."""
    sentence: str
    step: int | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    """The samples of that step, see `index.samples_of_step`."""


def write_failure(folder: Path, failure: Failure) -> None:
    """Write failure.json."""
    write_json(folder / FAILURE_FILE, asdict(failure))


def read_failure(folder: Path) -> Failure | None:
    """Read failure.json; None where there is none."""
    file = folder / FAILURE_FILE
    if not file.is_file():
        return None
    mend = "remove it to go on from the last checkpoint"
    values = read_json(file, mend)
    try:
        return TypeAdapter(Failure).validate_python(values)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise L0MoEError(f"{file} has no fitting {key} ({problem['msg']}); {mend}.") from error


def refuse_failure(folder: Path) -> None:
    """Forget a refusal, which may have been mended by now.

    Raises:
        L0MoEError: an earlier attempt failed in a way that would repeat itself.
    """
    failure = read_failure(folder)
    if failure is not None and failure.kind != "refused":
        raise L0MoEError(failure.sentence)
    (folder / FAILURE_FILE).unlink(missing_ok=True)


def forget_stop(folder: Path) -> None:
    """Remove a stop request and its answer."""
    for name in (STOP_FILE, STOPPED_FILE):
        (folder / name).unlink(missing_ok=True)


def stopped_at(folder: Path) -> int | None:
    """Return the step at which the last attempt saved and ended because it was asked to; None where it was not."""
    file = folder / STOPPED_FILE
    text = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    return int(text) if text.isdigit() else None


def how_to_go_on(folder: Path) -> str:
    """Return the end of a failure's sentence."""
    return f"remove {folder / FAILURE_FILE} to go on from the last checkpoint"

"""`runs/NAME/slurm/jobs.json`: which jobs were submitted for a run, so that status, cancel and a rerun find them."""

import datetime
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.launch.stages import Run
from megatron_l0moe.runs.slurm_commands import parse_array
from megatron_l0moe.runs.stage_folder import write_json


@dataclass(frozen=True, kw_only=True)
class SubmittedJob:
    """One call of sbatch."""

    stage: str
    job: str
    """Its number."""
    submitted: str
    """When, ISO 8601, UTC."""
    after: list[str]
    """Jobs, or tasks of arrays, that have to succeed before."""
    script: str
    log: str
    """With Slurm's placeholders."""
    array: str | None
    """Experts, as sbatch's --array takes them; None: no array."""
    nodes: int
    gpus: int
    """Of the job, or of each task of an array."""

    @property
    def tasks(self) -> dict[str, int | None]:
        """Names that Slurm gives to what runs, and the expert of each."""
        if self.array is None:
            return {self.job: None}
        return {f"{self.job}_{k}": k for k in parse_array(self.array)}

    def log_of(self, task: str) -> Path:
        """Return the log of one of the tasks."""
        job, _, index = task.partition("_")
        return Path(self.log.replace("%A", job).replace("%a", index).replace("%j", job))


@dataclass
class Record:
    """All jobs of a run."""

    recipe_file: str = ""
    cluster_file: str = ""
    jobs: list[SubmittedJob] = field(default_factory=list)
    """In the order of submission; of two for the same work the later one counts."""
    cancelled: list[str] = field(default_factory=list)
    """Numbers of jobs that a command of ours has ended."""

    def of_stage(self, name: str) -> list[SubmittedJob]:
        """Return the jobs of a stage, oldest first."""
        return [job for job in self.jobs if job.stage == name]


def record_file(run_folder: Path) -> Path:
    """Return the file of a run."""
    return run_folder / "slurm" / "jobs.json"


def read_record(run_folder: Path) -> Record:
    """Return the jobs of a run; none where nothing was submitted.

    Raises:
        L0MoEError: the file is not ours.
    """
    path = record_file(run_folder)
    if not path.is_file():
        return Record()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return Record(**{**value, "jobs": [SubmittedJob(**job) for job in value["jobs"]]})
    except (ValueError, TypeError, KeyError) as error:
        raise L0MoEError(
            f"{path} cannot be read ({error}); cancel its jobs by hand and remove it."
        ) from error


def write_record(run: Run, record: Record) -> None:
    """Write the jobs of a run."""
    write_json(record_file(run.folder), asdict(record))


def now() -> str:
    """Return the time in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

"""A training stage as a batch job does it: `--phase prepare`, the training processes, `--phase finish`.

Both phases are short commands on one node; the training between them is started by the batch script, on all nodes.
`FOLDER/verdict` says how it goes on, in one word, since the exit codes of srun may be those of a signal:

| verdict | exit code | the batch script |
|---|---|---|
| none, after `prepare` | 0 | trains |
| done | 0 | ends with 0 |
| again | 75 | requeues itself |
| stop | 2 | ends with 1; one sentence was said |

Of two batch jobs on one folder the second is refused (exit code 2) and touches nothing, no verdict either.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_l0moe.chain import attempts, preflight, provenance, run_local, training_commands
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.index.index import describe_places, samples_of_step
from megatron_l0moe.runs.child_process import lost_a_node, reason_in
from megatron_l0moe.runs.lock import locked
from megatron_l0moe.runs.stage_folder import (
    STARTED,
    StageFolder,
    begin,
    has_marker,
    is_done,
    wait_for_inputs,
    write_text,
)
from megatron_l0moe.runs.stages import Run, place_of, spec_of, stages
from megatron_l0moe.runs.training_end import (
    STOPPED,
    Failure,
    how_to_go_on,
    read_failure,
    refuse_failure,
    write_failure,
)
from megatron_l0moe.sizes.architecture import Architecture

logger = logging.getLogger(__name__)

VERDICT = "verdict"
LOGS_VARIABLE = "L0MOE_LOG_DIR"
"""Environment variable in which the batch script names the folder of the attempt's per-rank logs."""
Phase = Literal["prepare", "finish"]
Verdict = Literal["done", "again", "stop"]
Numbers = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """A stage that trains, one folder of it."""

    run: Run
    stage: StageFolder
    index: int | None
    """The expert, counted from 0; None: MoE training."""
    work: Callable[[StageFolder], Numbers]
    """What is left to do once the last step is saved; returns numbers for the manifest."""

    @property
    def folder(self) -> Path:
        """Where it trains."""
        return self.stage.folder

    @property
    def steps(self) -> int:
        """Steps of the whole job."""
        recipe = self.run.recipe
        return recipe.moe_steps if self.index is None else recipe.expert_steps

    @property
    def save_interval(self) -> int | None:
        """Steps from one checkpoint to the next; None where training goes on while one is written."""
        recipe = self.run.recipe
        training = recipe.expert_training if self.index is not None else recipe.moe_training
        return None if training.flags.get("async-save") else training.save_interval

    @property
    def job(self) -> training_commands.TrainingCommand:
        """The training command."""
        architecture = Architecture.from_hf(Path(self.run.recipe.model.path))
        preflight.check_sizes(self.run.recipe, architecture)
        if self.index is None:
            return training_commands.moe_job(self.run, architecture)
        return training_commands.expert_job(self.run, architecture, self.index)

    @property
    def is_trained(self) -> bool:
        """Whether the last step is saved; an expert that is extracted has no checkpoints any more."""
        return attempts.saved_step(self.folder) == self.steps or run_local.is_extracted(self.folder)

    def samples_of(self, step: int) -> tuple[str, list[dict[str, object]]]:
        """Describe the samples of a step, in words and one by one."""
        recipe, curate = self.run.recipe, self.run.stage_folder("curate")
        if self.index is None:
            prefix, batch = curate / "moe", recipe.moe_global_batch_size
        else:
            prefix, batch = curate / f"expert_{self.index:03d}", recipe.expert_training.global_batch_size
        try:
            places = samples_of_step(prefix, step, batch)
        except L0MoEError as error:
            return f"samples that are not known ({str(error).rstrip('.')})", []
        return describe_places(prefix, places), [place.as_dict() for place in places]


def run_phase(
    run: Run, name: str, phase: str, work: Callable[[StageFolder], Numbers], *, index: int | None = None
) -> int:
    """Do one phase; returns the exit code.

    Args:
        name: `experts` or `moe`.
        work: what is left to do once the last step is saved, such as cutting the expert.
        index: the expert.
    """
    if phase not in ("prepare", "finish"):
        raise L0MoEError(f"--phase must be prepare or finish, got {phase!r}.")
    if name == "experts" and index is None:
        raise L0MoEError("--phase needs --index K, because a batch job trains one expert.")
    wanted = stages(run, name)
    if index is not None and not 0 <= index < len(wanted):
        raise L0MoEError(f"--index {index} must be between 0 and {len(wanted) - 1}.")
    this = TrainingJob(run=run, stage=wanted[index or 0], index=index, work=work)
    with locked(run.folder, expert=index):
        attempts.check_owner(this.folder)
        (this.folder / VERDICT).unlink(missing_ok=True)
        try:
            return _prepare(this) if phase == "prepare" else _finish(this)
        except L0MoEError:
            _say(this, "stop")
            raise


def _prepare(this: TrainingJob) -> int:
    if has_marker(this.stage) and is_done(this.stage):
        return _say(this, "done")
    spec = spec_of(this.stage.name, this.run.recipe.method)
    wait_for_inputs(this.stage)
    run_local.check_inputs(this.run, spec)
    provenance.check(this.run, this.stage)
    begin(this.stage, spec.restart)
    past = _close_last(this, seen=False)
    if this.is_trained:
        return _finish(this)
    refuse_failure(this.folder)
    _refuse_if_hopeless(this, past)
    job = this.job
    logs = os.environ.get(LOGS_VARIABLE)
    attempt = attempts.open_attempt(this.folder, Path(logs) if logs else this.folder / "train.log")
    run_local.record_start(this.run, job, this.stage)
    logger.info(
        "Attempt %d in %s goes on from step %d of %d.",
        attempt.number,
        this.folder,
        attempt.start_step,
        this.steps,
    )
    return 0


def _finish(this: TrainingJob) -> int:
    if has_marker(this.stage) and is_done(this.stage):
        return _say(this, "done")
    past = _close_last(this, seen=True)
    if this.is_trained:
        begun = time.monotonic()
        numbers = this.work(this.stage)
        seconds = sum(attempts.seconds(attempt) for attempt in past) + time.monotonic() - begun
        process = {"seconds": round(seconds, 3), "attempts": len(past)}
        provenance.finish_stage(this.run, this.stage, {**numbers, "process": process})
        return _say(this, "done")
    failure = read_failure(this.folder)
    if failure is not None:
        raise L0MoEError(failure.sentence)
    _refuse_if_hopeless(this, past)
    logger.info(
        "%s: %s at step %d of %d; it goes on in a new attempt.",
        this.folder,
        past[-1].how if past else "not begun",
        attempts.saved_step(this.folder),
        this.steps,
    )
    return _say(this, "again")


def _close_last(this: TrainingJob, *, seen: bool) -> list[attempts.Attempt]:
    """Complete the record of the last attempt if it is open, from its folder and its logs; returns all attempts."""
    past = attempts.read(this.folder)
    if not past or past[-1].how is not None:
        return past
    last, logs = past[-1], Path(past[-1].logs)
    job = logs.name.rpartition("_r")[0]  # as the batch script names the folder of a start
    log = str(place_of(this.run).log(this.stage.name)).replace("%A_%a", job).replace("%j", job)
    return attempts.close_last(
        this.folder,
        this.steps,
        this.save_interval,
        reason_in(logs) if seen else None,
        lost_a_node=lost_a_node(Path(log), last.restarts + 1),
    )


def _refuse_if_hopeless(this: TrainingJob, past: list[attempts.Attempt]) -> None:
    why = attempts.judge(past)
    if why is None:
        return
    last = past[-1]
    reason = f" (the last time: {last.reason.rstrip('.')}; log {last.logs})" if last.reason else ""
    step, reads = last.last_step, ""
    samples: list[dict[str, object]] = []  # a save reads none
    if not last.saving:
        step = (last.last_step or 0 if last.place else last.start_step) + 1
        words, samples = this.samples_of(step)
        reads = f"; step {step} reads {words}"
    sentence = (
        f"Training in {this.folder} {why}{reason}{reads}; mend the cause, then {how_to_go_on(this.folder)}."
    )
    write_failure(this.folder, Failure(kind="crashes", sentence=sentence, step=step, samples=samples))
    raise L0MoEError(sentence)


def _say(this: TrainingJob, verdict: Verdict) -> int:
    """Write the verdict, into the record of the last attempt too, and return its exit code."""
    if (this.folder / STARTED).is_file():  # else the folder is not ours, or nothing was begun
        past = attempts.read(this.folder)
        if past:
            past[-1].verdict = verdict
            attempts.write(this.folder, past)
        write_text(this.folder / VERDICT, verdict + "\n")
    return {"done": 0, "again": STOPPED, "stop": 2}[verdict]

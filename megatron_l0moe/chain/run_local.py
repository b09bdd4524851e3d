"""The chain: do what is missing, in order, each stage in a process of its own, and leave nothing half-done.

`run_chain` is the parent: it only decides what is missing and starts `l0moe STAGE RECIPE` for it. `carry_out`
is what such a stage process does around the stage's own function: begin the folder, work, manifest, marker.
"""

import contextlib
import logging
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_l0moe.chain import attempts, machine, preflight, provenance, records, training_commands
from megatron_l0moe.chain.forecast import Forecast, forecast
from megatron_l0moe.chain.progress import Progress, seconds_left, words
from megatron_l0moe.chain.training_commands import construct_job
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.recipe import TITLES
from megatron_l0moe.runs.caller_environment import VERBOSE
from megatron_l0moe.runs.child_process import (
    USER_ERROR_EXIT,
    Command,
    CommandFailedError,
    run_command,
    run_commands,
)
from megatron_l0moe.runs.lock import inherited, locked
from megatron_l0moe.runs.stage_folder import (
    StageFolder,
    begin,
    drop_work,
    has_marker,
    input_digests,
    is_done,
    wait_for_inputs,
    write_json,
)
from megatron_l0moe.runs.stages import Run, StageSpec, selection, spec_of, stage_command, stages
from megatron_l0moe.runs.training_end import forget_stop, read_failure, refuse_failure, stopped_at
from megatron_l0moe.runtime.hardware import gpu_share
from megatron_l0moe.runtime.json_files import read_json
from megatron_l0moe.sizes.architecture import Architecture

logger = logging.getLogger(__name__)

PARENT_GRACE_SECONDS = 75.0
"""The grace of a process that gives its training job 30 s to stop; one that waits for such processes has twice it."""
LONG_SECONDS = 3600.0
"""A run that takes longer than this is told what would shorten it."""
Numbers = dict[str, object]


def run_chain(run: Run, *, first: str | None = None, last: str | None = None) -> None:
    """Run the stages from `first` to `last`, all that are not done yet.

    Raises:
        L0MoEError: a stage failed, or a folder holds work of another recipe.
        KeyboardInterrupt: we were told to stop; every process of the run has ended by then.
    """
    selected = selection(run.recipe.method, first, last)
    architecture = preflight.check(run.recipe)
    preflight.check_machine(run.recipe)
    run, this_machine = machine.settle(run)
    for spec in selected:  # refuse before the first hour of work, not after it
        for stage in stages(run, spec.name):
            has_marker(stage)
    with locked(run.folder) as lock:
        write_json(run.folder / "recipe.json", run.recipe.model_dump())
        ahead = forecast(run.recipe, architecture, this_machine)
        progress = Progress(run, selected, forecast=ahead)
        for line in outlook(run, selected, this_machine, ahead):
            progress.say(line)
        try:
            for spec in selected:
                _run_stage(run, spec, progress, lock)
        finally:
            progress.stop()
        if selected[-1].name == "report":
            _say_where(run, progress)


def outlook(
    run: Run, selected: tuple[StageSpec, ...], this_machine: machine.Machine, ahead: Forecast | None
) -> list[str]:
    """Say how long what is missing will take on this machine, and what would shorten it where that is hours."""
    lines = [f"Computing in {run.recipe.dtype} on {this_machine.words}."]
    left = seconds_left(run, tuple(spec.name for spec in selected), ahead) if ahead else None
    if left is None:
        return lines
    lines.append(f"This will take about {words(left)}, to a factor of two.")
    if left > LONG_SECONDS:
        lines.append(
            "To shorten it: fewer tokens (data.tokens_per_expert, data.tokens_per_set), experts that are chosen and "
            "not trained (expert_training.method: obs), a smaller model.path, or GPUs."
        )
    return lines


def carry_out(
    run: Run, name: str, work: Callable[[StageFolder], Numbers], *, only: int | None = None
) -> None:
    """Do one stage in this process: what is done stays, what is half-written is cleared or resumed.

    Args:
        work: writes the stage's files into `stage.folder` and returns numbers for the manifest.
        only: the expert to do, of a stage with one folder for each expert; None: all.
    """
    spec = spec_of(name, run.recipe.method)
    wanted = stages(run, name)
    if only is not None:
        if not 0 <= only < len(wanted):
            raise L0MoEError(f"--index {only} must be between 0 and {len(wanted) - 1}.")
        wanted = wanted[only : only + 1]
    with locked(run.folder, expert=only) as lock:
        if name == "experts" and only is None and run.recipe.expert_training.at_once > 1:
            _side_by_side(run, wanted, lock)
        for stage in wanted:
            if is_done(stage):
                logger.info("%s is done.", stage.folder)
                if spec.restart == "own":
                    drop_work(stage)  # the command may have been killed before it came to that
                continue
            if "SLURM_JOB_ID" in os.environ:  # the stages before may have ended on other nodes a moment ago
                wait_for_inputs(stage)
            check_inputs(run, spec)
            input_digests(stage)
            begin(stage, spec.restart)
            started = time.monotonic()
            with provenance.checked(run, stage):
                numbers = work(stage)
            seconds = round(time.monotonic() - started, 3)
            process = {"seconds": seconds, "peak_process_bytes": peak_process_bytes()}
            provenance.finish_stage(run, stage, {**numbers, "process": process})
            if spec.restart == "own":
                drop_work(stage)


def train_expert(run: Run, stage: StageFolder) -> None:
    """Run the training job of one expert to its end, from its last checkpoint if it has one."""
    preflight.check_machine(run.recipe, "expert_training")
    k = int(stage.folder.name)
    job = training_commands.expert_job(run, _architecture(run), k)
    logger.info("Expert %d of %d: %d steps.", k + 1, run.recipe.model.num_experts, run.recipe.expert_steps)
    _train(run, job, stage, run.recipe.expert_steps)


def construct_expert(run: Run, stage: StageFolder) -> Numbers:
    """Make one expert from a calibration pass; one that is there already is not made again."""
    preflight.check_machine(run.recipe, "expert_training")
    k = int(stage.folder.name)
    record = stage.folder / "construction.json"  # written after the expert
    if not record.is_file():
        method, sequences = run.recipe.expert_training.method, run.recipe.calibration_sequences
        logger.info(
            "Expert %d of %d: %s, %d sequences.", k + 1, run.recipe.model.num_experts, method, sequences
        )
        _run_job(construct_job(run, _architecture(run), k), stage.folder / "construct.log")
    return read_json(record, f"remove {stage.folder} to make the expert anew")


def train_moe(run: Run, stage: StageFolder) -> None:
    """Run MoE training, or that of another method, to its end, from its last checkpoint if it has one."""
    preflight.check_machine(run.recipe, "moe_training")
    what = "MoE" if run.recipe.method == "l0moe" else TITLES[run.recipe.method]
    logger.info("%s training: %d steps.", what, run.recipe.moe_steps)
    _train(run, training_commands.moe_job(run, _architecture(run)), stage, run.recipe.moe_steps)


def write_logits(run: Run, stage: StageFolder) -> Path:
    """Let Megatron write its logits on held-out text, to compare with the exported model's; returns the file."""
    _run_job(training_commands.logits_job(run, _architecture(run)), stage.folder / "logits.log")
    return training_commands.logits_file(run)


def extract_once(folder: Path, extract: Callable[[], Numbers]) -> Numbers:
    """Extract an expert and drop its training checkpoints, safely against being killed at any point.

    `extraction.json` is written after the expert, so when it is there the checkpoints are not needed any more.
    """
    record = folder / "extraction.json"
    if not record.is_file():
        write_json(record, extract())
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return read_json(record, f"remove {folder} to train the expert anew")


def is_extracted(folder: Path) -> bool:
    """Say whether training and extraction of an expert are over, though its marker may be missing."""
    return (folder / "extraction.json").is_file()


def peak_process_bytes() -> int:
    """Return the largest resident size that this process or any child that has ended ever had."""
    kilo = 1 if sys.platform == "darwin" else 1024
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(usage.ru_maxrss for usage in usages) * kilo


def _architecture(run: Run) -> Architecture:
    architecture = Architecture.from_hf(Path(run.recipe.model.path))
    preflight.check_sizes(run.recipe, architecture)
    return architecture


def check_inputs(run: Run, spec: StageSpec) -> None:
    """Refuse inputs that were made with other settings, or from inputs that have been made anew since."""
    for name in spec.inputs:
        for stage in stages(run, name):
            is_done(stage)


def _train(run: Run, job: training_commands.TrainingCommand, stage: StageFolder, steps: int) -> None:
    """Run a training job to its last step; a job whose last checkpoint is there already is not started again."""

    def is_trained() -> bool:
        return attempts.saved_step(stage.folder) == steps

    if not is_trained():
        attempts.check_owner(stage.folder)
        refuse_failure(stage.folder)
        forget_stop(stage.folder)
        record_start(run, job, stage)
        try:
            _run_job(job, stage.folder / "train.log")
        except CommandFailedError as failed:
            if failure := read_failure(stage.folder):
                raise L0MoEError(failure.sentence) from failed
            if (step := stopped_at(stage.folder)) is not None:
                raise L0MoEError(
                    f"Training in {stage.folder} was stopped after step {step} of {steps}; run the same command to "
                    "go on."
                ) from failed
            raise
    if not is_trained():
        raise L0MoEError(
            f"Training in {stage.folder} ended without an error before its last step, {steps}; see "
            f"{stage.folder / 'train.log'}, and run the same command to go on."
        )


def record_start(run: Run, job: training_commands.TrainingCommand, stage: StageFolder) -> None:
    """Write down what a training job is started from."""
    command = ["env", *(f"{name}={value}" for name, value in job.env.items()), *job.command]
    records.write_records(run, stage.folder, command, attempt=records.next_attempt(stage.folder))


def _run_job(job: training_commands.TrainingCommand, log: Path) -> None:
    run_command(job.command, log=log, env=job.env, keep_open=inherited())


def _side_by_side(run: Run, wanted: tuple[StageFolder, ...], lock: tuple[int, ...]) -> None:
    """Train the experts that are not done yet, several at the same time, each by a command of its own."""
    commands = [
        Command(
            words=[*stage_command(run, "experts"), "--index", str(k)],
            log=run.log_file(f"expert_{k:03d}"),
            env={VERBOSE: "1"},
        )
        for k, stage in enumerate(wanted)
        if not is_done(stage)
    ]
    processes = run.recipe.expert_training.parallel.processes
    with _failures_of("experts"):
        run_commands(
            commands,
            at_once=run.recipe.expert_training.at_once,
            share=lambda place: gpu_share(place, processes),
            grace=PARENT_GRACE_SECONDS,
            keep_open=lock,
        )


@contextlib.contextmanager
def _failures_of(name: str) -> Iterator[None]:
    """Say in one sentence why a stage's process failed; a sentence of its own for the user is passed on."""
    try:
        yield
    except CommandFailedError as failure:
        if failure.code == USER_ERROR_EXIT:
            raise L0MoEError(failure.last_line) from failure
        raise L0MoEError(f"Stage {name} failed. {failure}") from failure


def _run_stage(run: Run, spec: StageSpec, progress: Progress, lock: tuple[int, ...]) -> None:
    if all(is_done(stage) for stage in stages(run, spec.name)):
        progress.done_before(spec)
        return
    progress.start(spec)
    with _failures_of(spec.name):
        run_command(
            stage_command(run, spec.name),
            log=run.log_file(spec.name),
            env={VERBOSE: "1"},
            poll=lambda: progress.tick(spec),
            grace=2 * PARENT_GRACE_SECONDS,
            keep_open=lock,
        )
    if not all(is_done(stage) for stage in stages(run, spec.name)):
        raise L0MoEError(
            f"Stage {spec.name} ended without finishing its work, perhaps because the recipe was edited meanwhile; "
            f"see {run.log_file(spec.name)}, and run the same command to go on."
        )
    progress.finish(spec)


def _say_where(run: Run, progress: Progress) -> None:
    from megatron_l0moe.reports.page import summary_lines  # matplotlib and jinja2: only here

    summary = read_json(run.folder / "summary.json", f"remove {run.stage_folder('report')} to write it anew")
    progress.say(f"Report: {run.stage_folder('report') / 'report.html'}")
    progress.say(f"Model:  {run.stage_folder('export')}")
    for line in summary_lines(summary):
        progress.say(line)

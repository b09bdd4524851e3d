"""Which checkpoint of a folder can be used, whether it is one of this job, and where the job starts from.

A job starts from its own last good checkpoint, or from the stage's initial weights; both are checked first. The check
is cheap: names and sizes of files are compared with what `.metadata` says, settings with our own; no tensor is read.
"""

import argparse
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.training.checkpointing import checkpoint_exists

from megatron_l0moe.checkpoints.torch_dist import (
    RELEASE,
    SETTINGS_KEY,
    TRACKER_NAME,
    CheckpointReader,
    tracked,
)
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs.stage_folder import write_text
from megatron_l0moe.runtime.checkpoint_metadata import read_metadata
from megatron_l0moe.training.arguments import JobSettings, settings_as_dict

logger = logging.getLogger(__name__)

# Settings and arguments that shape the model; the same in each stage's initial weights and in its own checkpoints.
MODEL_SETTINGS = ("dense_layers", "l0_expert_ffn")
BLOCK_SETTINGS = ("l0_blocks", "l0_block_threshold")
"""Further settings of DSMoE's checkpoints; in others they mean nothing."""
MASK_SETTINGS = ("l0_masks", "l0_masks_top_k", "l0_masks_target")
"""Further settings of MoM's checkpoints."""
MODEL_ARGUMENTS = (
    *(
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
    ),
    *("untie_embeddings_and_output_weights", "add_qkv_bias", "num_experts", "moe_ffn_hidden_size"),
    "moe_router_topk",
)
# Arguments that must not change either when a job goes on: schedule, data position, precision, what is trained.
RUN_ARGUMENTS = (
    *("train_iters", "global_batch_size", "seq_length", "bf16", "use_distributed_optimizer"),
    *("lr", "min_lr", "l0_mask_lr", "l0_lambda_lr", "l0_router_lr", "l0_train_weights"),
)
# Of these, what Megatron's --override-opt-param-scheduler lets a job change.
SCHEDULE_ARGUMENTS = frozenset({"train_iters", "lr", "min_lr"})
STAGE_BEFORE = {"dense": "dense", "expert": "dense", "moe": "moe", "dsmoe": "dense", "mom": "dense"}
"""Stage that the initial weights of a stage are marked with; `assemble` marks its own as `moe`."""
_ITERATION = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True)
class Found:
    """A checkpoint that can be read."""

    reader: CheckpointReader
    damaged: tuple[Path, ...] = ()
    """Newer ones that cannot."""

    @property
    def iteration(self) -> str:
        """What the tracker file says of it."""
        match = _ITERATION.fullmatch(self.reader.path.name)
        return str(int(match[1])) if match else RELEASE


def last_good(folder: Path) -> Found | None:
    """Return the checkpoint that the tracker file names or, where that one is damaged, the newest good one.

    Returns:
        None where no checkpoint was ever finished.
    """
    tracker = folder / TRACKER_NAME
    named, problems = _named(folder)
    damaged: list[Path] = []
    for path in _candidates(folder, named):
        try:
            reader = open_checkpoint(path)
        except L0MoEError as error:
            problems.append(str(error).rstrip("."))
            damaged.append(path)
            continue
        if problems:
            logger.warning("%s; going on from %s", "; ".join(problems), path)
        return Found(reader, tuple(damaged))
    if tracker.is_file():
        raise L0MoEError(
            f"No checkpoint in {folder} can be used ({'; '.join(problems)}); restore one, or delete the folder to "
            "start the job from its initial weights."
        )
    if problems:
        logger.warning("%s; no checkpoint was finished before, so the job starts anew", "; ".join(problems))
    return None


def open_checkpoint(path: Path) -> CheckpointReader:
    """Open the folder of one iteration.

    Raises:
        L0MoEError: its save was not finished, a file is missing or too short, its settings cannot be read.
    """
    if not (path / "metadata.json").is_file():  # what Megatron writes last
        problem = "was not finished (no metadata.json)" if path.is_dir() else "does not exist"
        raise L0MoEError(f"The checkpoint {path} {problem}.")
    return CheckpointReader(path)


def take_up(folder: Path, found: Found) -> None:
    """Let the tracker file name the checkpoint found.

    Damaged ones are put aside: a new save into their folder that is cut short could be mistaken for a whole one.
    """
    for path in found.damaged:
        if path.is_dir():
            aside = _free_name(path)
            path.rename(aside)
            logger.warning("the damaged checkpoint %s is now %s", path, aside.name)
    tracker = folder / TRACKER_NAME
    if (
        not tracker.is_file()
        or tracker.read_text(encoding="utf-8", errors="replace").strip() != found.iteration
    ):
        write_text(tracker, found.iteration)


def check_own(reader: CheckpointReader, args: argparse.Namespace, settings: JobSettings) -> None:
    """Refuse a checkpoint of another stage or recipe."""
    stored = _stored_settings(reader, settings)
    _check_stage(reader, stored, settings.plan.stage, settings)
    _compare(reader, stored, settings_as_dict(settings), settings_as_dict(settings))
    skipped = SCHEDULE_ARGUMENTS if args.override_opt_param_scheduler else frozenset()
    names = [*MODEL_ARGUMENTS, *(name for name in RUN_ARGUMENTS if name not in skipped)]
    _compare(reader, _stored_arguments(reader), vars(args), names)


def check_model(
    reader: CheckpointReader, args: argparse.Namespace, settings: JobSettings, stage: str
) -> None:
    """Refuse weights of another model or not of `stage`."""
    stored = _stored_settings(reader, settings)
    _check_stage(reader, stored, stage, settings)
    names = (*MODEL_SETTINGS, *{"dsmoe": BLOCK_SETTINGS, "mom": MASK_SETTINGS}.get(stage, ()))
    _compare(reader, stored, settings_as_dict(settings), names)
    _compare(reader, _stored_arguments(reader), vars(args), MODEL_ARGUMENTS)


def _candidates(folder: Path, named: Path | None) -> list[Path]:
    iterations = [path for path in folder.glob("iter_*") if _ITERATION.fullmatch(path.name) and path.is_dir()]
    iterations.sort(key=lambda path: int(path.name.removeprefix("iter_")), reverse=True)
    if named is None:
        return iterations
    return [named, *(path for path in iterations if path != named)]


def _named(folder: Path) -> tuple[Path | None, list[str]]:
    try:
        return tracked(folder), []
    except L0MoEError as error:
        return None, [str(error).rstrip(".")]


def _free_name(path: Path) -> Path:
    number = 0
    while (aside := path.with_name(f"damaged_{number}_{path.name}")).exists():
        number += 1
    return aside


def _stored_settings(reader: CheckpointReader, settings: JobSettings) -> dict[str, Any]:
    stored = reader.common.get(SETTINGS_KEY)
    if not isinstance(stored, dict) or "stage" not in stored:
        raise L0MoEError(
            f"The checkpoint {reader.path} holds no L0 settings, so nothing says which layers it has; use one that was "
            f"written by this program for --l0-stage {settings.plan.stage}."
        )
    return stored


def _stored_arguments(reader: CheckpointReader) -> dict[str, Any]:
    return dict(vars(reader.common["args"])) if "args" in reader.common else {}


def _check_stage(reader: CheckpointReader, stored: dict[str, Any], stage: str, settings: JobSettings) -> None:
    if stored["stage"] != stage:
        raise L0MoEError(
            f"The checkpoint {reader.path} is of the stage {stored['stage']!r}, but --l0-stage {settings.plan.stage} "
            f"takes one of the stage {stage!r} there; give another folder."
        )


def _compare(
    reader: CheckpointReader, stored: dict[str, Any], own: dict[str, Any], names: Iterable[str]
) -> None:
    """Compare the named values where both have them: initial weights do not know the schedule of a run."""
    for name in names:
        if name in stored and name in own and stored[name] != own[name]:
            flag = "--" + name.removeprefix("l0_").replace("_", "-")
            flag = (
                flag.replace("--", "--l0-", 1) if name.startswith("l0_") or name == "dense_layers" else flag
            )
            raise L0MoEError(
                f"The checkpoint {reader.path} was made with {flag} {stored[name]}, but this job has {own[name]}; use "
                "the same value, or other folders for --load and --save."
            )


Start = Literal["own", "initial", "nothing"]
# State that a stage adds to the weights it starts from; Megatron's empty `_extra_state` objects carry nothing.
ADDED_STATE = re.compile(r"\.mlp\.(gate|block_gate|masks|mask_router)\.|\.router\.expert_load\.|_extra_state")


def check(models: list[Any], args: argparse.Namespace, settings: JobSettings) -> list[Any]:
    """Find and check the checkpoint that Megatron loads next, and say how strictly it matches keys.

    A hook that Megatron calls with the model chunks, when process groups exist and nothing is loaded. Rank 0 looks at
    the files and tells the others, so that all ranks start from the same checkpoint or stop with the same sentence. A
    job's own checkpoint must hold every key. The initial weights hold all but the state that the stage adds (gates;
    counters of the routers), so there Megatron is told to log what the checkpoint lacks, and `check_keys` refuses
    everything else.

    Raises:
        L0MoEError: the checkpoint is damaged, of another job, or lacks a tensor of the model.
    """
    start = _on_rank_0(args, settings)
    if start == "own":
        args.dist_ckpt_strictness = "raise_unexpected"
    elif start == "initial":
        args.dist_ckpt_strictness = "log_unexpected"
        check_keys(models, args)
    return models


def choose(args: argparse.Namespace, settings: JobSettings) -> Start:
    """Look at the files, repair the tracker file of the job's own folder, and return where the job starts."""
    folder = Path(args.load) if args.load else None
    if folder is not None and args.ckpt_step:
        reader = open_checkpoint(folder / f"iter_{args.ckpt_step:07d}")
        check_own(reader, args, settings)
        return "own"
    found = last_good(folder) if folder is not None else None
    if folder is not None and found is not None:
        if args.finetune:
            check_model(found.reader, args, settings, settings.plan.stage)
        else:
            check_own(found.reader, args, settings)
        take_up(folder, found)
        return "own"
    if not args.pretrained_checkpoint:
        return "nothing"
    stage = STAGE_BEFORE[settings.plan.stage]
    initial = Path(args.pretrained_checkpoint)
    if not checkpoint_exists(args.pretrained_checkpoint):
        raise L0MoEError(
            f"--pretrained-checkpoint {initial} holds no Megatron checkpoint; "
            f"run the stage before '{settings.plan.stage}' first."
        )
    check_model(CheckpointReader(initial), args, settings, stage)
    logger.info("starting from the initial weights in %s", initial)
    return "initial"


def check_keys(models: list[Any], args: argparse.Namespace) -> None:
    """Refuse initial weights that lack a tensor of the model, which would then train from random values."""
    folder = Path(args.pretrained_checkpoint)
    found = read_metadata(tracked(folder) or folder).state_dict_metadata
    lost = sorted(key for model in models for key in model_keys(model) if key not in found)
    if lost:
        raise L0MoEError(
            f"--pretrained-checkpoint {args.pretrained_checkpoint} lacks {lost[0]} ({len(lost)} tensors in all); "
            "it is of another model or another stage, so run the stage before again."
        )


def model_keys(model: Any) -> set[str]:
    """Return the checkpoint keys of a model, without the state that our stages add."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    keys = {entry.key for entry in model.sharded_state_dict(metadata=metadata).values()}
    return {key for key in keys if not ADDED_STATE.search(key)}


def _on_rank_0(args: argparse.Namespace, settings: JobSettings) -> Start:
    answer: list[tuple[Start, str]] = [("nothing", "")]
    if torch.distributed.get_rank() == 0:
        try:
            answer = [(choose(args, settings), "")]
        except L0MoEError as error:
            answer = [("nothing", str(error))]
    torch.distributed.broadcast_object_list(answer, src=0)
    start, refusal = answer[0]
    if refusal:
        raise L0MoEError(refusal)
    return start

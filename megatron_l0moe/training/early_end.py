"""Ends of a job before its last step: on request, and when its numbers are no numbers any more.

Megatron ends a run early with exit code 0 (training/training.py:4155), which a batch script takes for success. Here
every end before the last step has exit code 75, and says so in the folder of the stop file (`runs/training_end.py`).
"""

import argparse
import contextlib
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from megatron.training import get_args

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.index.index import describe_places, samples_of_step
from megatron_l0moe.runs.stage_folder import write_text
from megatron_l0moe.runs.training_end import STOPPED, STOPPED_FILE, Failure, how_to_go_on, write_failure
from megatron_l0moe.training import megatron_hooks

logger = logging.getLogger(__name__)

# core/rerun_state_machine.py:526, with --rerun-mode disabled
UPSTREAM_CHECK = re.compile(r"Unexpected result (?:tensor\()?-?(\w+).*?\(message='(.*?)'\)", re.S)


class NotANumberError(L0MoEError):
    """A loss or a gradient is NaN or infinite."""


class EarlyEnd:
    """The stop file of a job, and the step at which Megatron ended it early."""

    def __init__(self, stop_file: Path | None) -> None:
        self._stop_file = stop_file
        self.step: int | None = None

    def install(self) -> None:
        """Look for the stop file once a step, where Megatron decides whether to end."""

        def decide(megatrons: Callable[[], bool], iteration: int) -> bool:
            with _exit_after_this_step() if self._is_asked_for() else contextlib.nullcontext():
                ends = bool(megatrons())
            if ends:
                self.step = iteration
            return ends

        megatron_hooks.around_exit(decide)

    def _is_asked_for(self) -> bool:
        """Rank 0 looks and tells all others, so that they end after the same step."""
        if self._stop_file is None:
            return False
        looks = torch.distributed.get_rank() == 0
        answer = torch.tensor([looks and self._stop_file.exists()], dtype=torch.int32, device="cuda")
        torch.distributed.broadcast(answer, src=0)
        return bool(answer.item())

    def leave(self, steps: int) -> None:
        """Exit with code 75 unless the run ended at its last step; its checkpoint is complete by now."""
        if self.step is not None and self.step >= steps:
            return
        if self._stop_file is not None and self.step is not None:
            if torch.distributed.get_rank() == 0:
                write_text(self._stop_file.with_name(STOPPED_FILE), f"{self.step}\n")
            # torchrun ends all workers as soon as one has gone
            torch.distributed.barrier()
        logger.warning("ended after step %s of %d", self.step, steps)
        sys.exit(STOPPED)


@contextlib.contextmanager
def watched(args: argparse.Namespace, stop_file: str) -> Iterator[None]:
    """Give every end of Megatron's `pretrain` before the last step an exit code other than 0 and a record.

    Raises:
        NotANumberError: a loss or a gradient is NaN or infinite; says which step and which samples.
        SystemExit: with code 75, when Megatron ends the run before its last step.
    """
    file = Path(stop_file) if stop_file else None
    end = EarlyEnd(file)
    end.install()
    install_number_check()
    try:
        try:
            yield
        except SystemExit as leaving:
            if leaving.code:
                raise
            end.leave(args.train_iters)
        except RuntimeError as error:
            if found := UPSTREAM_CHECK.search(str(error)):
                raise NotANumberError(found[2]) from error
            raise
    except NotANumberError as error:
        failure = _not_a_number(args, str(error), file)
        if file is not None:
            write_failure(file.parent, failure)
        raise NotANumberError(failure.sentence.rstrip(".")) from error
    except L0MoEError as error:
        if file is not None:
            write_failure(file.parent, Failure(kind="refused", sentence=str(error)))
        raise


def install_number_check() -> None:
    """Check loss and gradient norm after each step, before anything is saved.

    Megatron checks each rank's gradients before they are summed, but not the loss of a step without gradients, not a
    sum that overflows, nothing with --no-check-for-nan-in-loss-and-grad, and with its default --rerun-mode
    validate_results not in the first step after a start (core/rerun_state_machine.py:592).
    """

    def check(given: megatron_hooks.Given) -> None:
        if not given["skipped_iter"]:  # a skipped step is the loss scaling of fp16 at work
            check_numbers(given["loss_dict"], given["grad_norm"])

    megatron_hooks.before_log(check)


def check_numbers(losses: dict[str, torch.Tensor], grad_norm: float | None) -> None:
    """Refuse a loss or a gradient norm that is not finite; ranks without a loss or without parameters have none.

    Raises:
        NotANumberError: names it.
    """
    values = {name: float(loss) for name, loss in losses.items()}
    if grad_norm is not None:
        values["gradient norm"] = float(grad_norm)
    for name, value in values.items():
        if not math.isfinite(value):
            raise NotANumberError(f"the {name} is {value}")


def _not_a_number(args: argparse.Namespace, what: str, stop_file: Path | None) -> Failure:
    step = int(get_args().curr_iteration) + 1
    samples = samples_of_step(Path(args.l0_data_index), step, args.global_batch_size)
    sentence = (
        f"Training stopped in step {step} of {args.train_iters}, because {what} on rank "
        f"{torch.distributed.get_rank()}; it read {describe_places(Path(args.l0_data_index), samples)}"
    )
    if stop_file is not None:
        sentence += (
            f"; lower the learning rate or look at these samples, then {how_to_go_on(stop_file.parent)}"
        )
    return Failure(
        kind="nan", sentence=sentence + ".", step=step, samples=[sample.as_dict() for sample in samples]
    )


@contextlib.contextmanager
def _exit_after_this_step() -> Iterator[None]:
    """Let Megatron save, unless it saves in this step anyway, and end: its --exit-interval (training.py:3318)."""
    args = get_args()
    before, args.exit_interval = args.exit_interval, 1
    try:
        yield
    finally:
        args.exit_interval = before

"""A step from its plan to whole units: only what is missing is done, and what was done is looked at again."""

import logging

from megatron_l0moe.data.engine.executors import execute
from megatron_l0moe.data.engine.step import UnitStep
from megatron_l0moe.data.engine.units import Plan, Record, read_records
from megatron_l0moe.data.engine.watch import Watch, completion_file, raise_task_error
from megatron_l0moe.errors import CorpusChangedError, L0MoEError
from megatron_l0moe.recipe.sections import ExecutorSection

logger = logging.getLogger(__name__)


def run_step(
    step: UnitStep,
    plan: Plan,
    section: ExecutorSection,
    *,
    what: str,
    count_items: bool = True,
    takes_gpu: bool = False,
) -> list[Record]:
    """Do all units of a plan that are not whole yet, and return the records of all, in their order.

    Args:
        step: what is done.
        plan: all of its units.
        section: where it is done.
        what: for the progress lines, such as "embedded documents".
        count_items: the step counts the plan's items, so it is known how many there are.
        takes_gpu: a task computes on a GPU where there is one.

    Raises:
        L0MoEError: a task failed, or a unit is not whole although its task said so.
    """
    root, folder = step.workspace.out, step.folder
    plan.save(folder)
    records = read_records(root, folder, plan, range(len(plan)))
    missing = [unit for unit, record in enumerate(records) if record is None]
    if len(missing) < len(plan):
        logger.info("%s: %d of %d units were done before", what, len(plan) - len(missing), len(plan))
    if missing:
        tasks = min(section.tasks or section.workers, len(plan))
        _mark(step, tasks, missing)
        left = sum(len(plan.items_of(unit)) for unit in missing) if count_items else None
        _watched(step, section, tasks, what, left, takes_gpu=takes_gpu)
        for unit, record in zip(missing, read_records(root, folder, plan, missing), strict=True):
            records[unit] = record
    broken = [unit for unit, record in enumerate(records) if record is None]
    if broken:
        raise L0MoEError(
            f"Unit {broken[0]} of {step.name} ({len(broken)} of {len(plan)} in all) is not whole in {folder} although "
            f"its task ended; see {folder / 'datatrove'}, check the disk, and run the same command to go on."
        )
    return [record for record in records if record]


def _mark(step: UnitStep, tasks: int, missing: list[int]) -> None:
    """Take datatrove's completion marker from tasks that have something to do.

    Markers of an earlier run may be of another number of tasks, or of files that have been damaged since.
    """
    unfinished = {unit % tasks for unit in missing}
    folder = completion_file(step.folder, 0).parent
    folder.mkdir(parents=True, exist_ok=True)
    for marker in folder.iterdir():
        if int(marker.name) >= tasks or int(marker.name) in unfinished:
            marker.unlink()


def _watched(
    step: UnitStep, section: ExecutorSection, tasks: int, what: str, total: int | None, *, takes_gpu: bool
) -> None:
    here = section.kind == "ray" or section.workers > 1
    with Watch(step.folder, what, total, workers_here=here and section.kind != "slurm") as watch:
        try:
            execute(step, section, tasks, takes_gpu=takes_gpu)
        except CorpusChangedError:
            raise
        except KeyboardInterrupt as interrupt:
            if not watch.killed:
                raise
            raise L0MoEError(
                f"A worker of {step.name} was killed from outside, as happens when memory runs out; lower "
                "data.executor.workers, and run the same command to go on."
            ) from interrupt
        except Exception:
            if section.kind != "local" or section.workers > 1:
                raise_task_error(step.folder)
            raise
    raise_task_error(step.folder)

"""What a run computes in, and how fast its machine is: found out once and kept in `runs/NAME/machine.json`.

A recipe's `dtype: auto` is settled here, before the hash of any stage is taken: bfloat16 where the run uses GPUs, else
what this CPU multiplies the model's own matrices faster in. The record then decides for every stage of the run, so that
two dtypes never mix; a run that goes on on a machine which would choose otherwise is told so.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.sections import Dtype
from megatron_l0moe.runs.stage_folder import write_json
from megatron_l0moe.runs.stages import Run
from megatron_l0moe.runtime.hardware import cpu_model, gpu_name, usable_cores, visible_gpus
from megatron_l0moe.runtime.json_files import read_json
from megatron_l0moe.sizes.architecture import Architecture

RECORD = "machine.json"
PROGRAM = "megatron_l0moe.runtime.cpu_speed"
KNOWN_FLOPS = "L0MOE_CPU_FLOPS"
"""Variable that holds FLOP/s by dtype as JSON, for a machine that is not to be measured: `{"float32": 1e11, ...}`."""
CLEARLY_FASTER = 1.2
"""From this ratio to float32 on, bfloat16 is worth its rounding."""
DAMAGED = "write the dtype that the run was begun in into the recipe, and remove the file"
PLAIN_SHAPES = ((1024, 4096), (4096, 1024))
"""What is timed while the model is not there yet."""
Shapes = Sequence[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine that a run computes on."""

    kind: Literal["cpu", "gpu"]
    name: str
    """What the processor or the GPU calls itself."""
    cores: int
    """Cores that our processes may use."""
    flops: dict[str, float]
    """FLOP/s of the model's matrix products on all cores together, by dtype; empty on GPUs, which are not measured."""

    @property
    def dtype(self) -> Dtype:
        """What `dtype: auto` means on this machine."""
        if self.kind == "gpu":
            return "bfloat16"
        return "bfloat16" if self.flops["bfloat16"] > CLEARLY_FASTER * self.flops["float32"] else "float32"

    @property
    def words(self) -> str:
        """One line for people, such as `AMD EPYC, 2 cores, 96 GFLOP/s in float32 and 9 in bfloat16`."""
        if not self.flops:
            return self.name
        speeds = " and ".join(f"{speed / 1e9:.0f} in {name}" for name, speed in self.flops.items())
        return f"{self.name}, {self.cores} cores, matrix products at (GFLOP/s) {speeds}"

    def is_like(self, other: "Machine") -> bool:
        """Say whether two machines are of one kind, whatever was measured."""
        return replace(self, flops={}) == replace(other, flops={})


@dataclass(frozen=True, kw_only=True)
class MachineRecord:
    """What a run was begun with."""

    dtype: Dtype
    machine: Machine | None
    """None for a run from before machines were recorded: float32, where its flags did not say otherwise."""


def here() -> Machine:
    """Return this machine, not measured."""
    if visible_gpus():
        return Machine(kind="gpu", name=gpu_name() or "GPU", cores=usable_cores(), flops={})
    return Machine(kind="cpu", name=cpu_model(Path("/proc/cpuinfo")), cores=usable_cores(), flops={})


def measured(shapes: Shapes) -> dict[str, float]:
    """Time matrix products on this CPU in a process of its own: about a second, and the time that torch takes to start.

    What `L0MOE_CPU_FLOPS` says is taken instead.

    Raises:
        L0MoEError: the process failed, or the variable does not hold a speed of each dtype.
    """
    if (given := os.environ.get(KNOWN_FLOPS)) is not None:
        return _given(given)
    command = [sys.executable, "-m", PROGRAM, json.dumps([list(shape) for shape in shapes])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_without_threads())
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise L0MoEError(
            f"The speed of this machine could not be measured ({last}); write dtype: float32 or bfloat16 into the "
            "recipe."
        )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _given(text: str) -> dict[str, float]:
    try:
        return {name: float(json.loads(text)[name]) for name in ("float32", "bfloat16")}
    except (ValueError, KeyError, TypeError) as error:
        raise L0MoEError(
            f'{KNOWN_FLOPS} ({text}) must be FLOP/s by dtype, such as {{"float32": 1e11, "bfloat16": 2e10}}; correct '
            "it, or unset it to have this machine measured."
        ) from error


def settle(
    run: Run,
    *,
    on_gpus: bool = False,
    keep: bool = True,
    place: Callable[[], Machine] = here,
    measure: Callable[[Shapes], dict[str, float]] = measured,
) -> tuple[Run, Machine]:
    """Return the run with its dtype in the place of the recipe's `auto`, and the machine with its speed.

    Args:
        on_gpus: the run's jobs get GPUs, whatever this machine has.
        keep: write the record; False where nothing may be written.
        place: names this machine.
        measure: times matrix products of the given shapes here.

    Raises:
        L0MoEError: the run was begun in another dtype than `auto` means on this machine.
    """
    record, machine = read_record(run.folder), place()
    if on_gpus or run.recipe.gpus is not None:
        machine = Machine(kind="gpu", name="GPUs", cores=machine.cores, flops={})
    if machine.kind == "cpu":
        known = record.machine if record is not None else None
        same = known is not None and known.flops and known.is_like(machine)
        machine = known if same and known else replace(machine, flops=measure(_shapes(run)))
    dtype = _dtype(run, record, machine)
    now = MachineRecord(dtype=dtype, machine=machine)
    if keep and now != record:
        write_json(run.folder / RECORD, asdict(now))
    return replace(run, recipe=run.recipe.settled(dtype)), machine


def begun(run: Run) -> Run:
    """Return the run in the dtype that its record names; without a record, it is settled here.

    For the stages of a chain, whose first command has settled the dtype already, perhaps on another machine.
    """
    if run.recipe.dtype != "auto":
        return replace(run, recipe=run.recipe.settled())
    record = read_record(run.folder)
    return replace(run, recipe=run.recipe.settled(record.dtype)) if record else settle(run)[0]


def read_record(folder: Path) -> MachineRecord | None:
    """Return what the run in a folder was begun with; None for one that was not begun."""
    file = folder / RECORD
    if not file.is_file():
        return MachineRecord(dtype="float32", machine=None) if _is_older(folder / "recipe.json") else None
    raw = read_json(file, DAMAGED)
    try:
        record = MachineRecord(dtype=raw["dtype"], machine=Machine(**raw["machine"]))
        if record.dtype not in ("float32", "bfloat16") or (record.machine and not _is_sound(record.machine)):
            raise ValueError("other values than a run writes")
    except (ValueError, KeyError, TypeError) as error:
        raise L0MoEError(f"{file} is damaged ({error}); {DAMAGED}.") from error
    return record


def _is_sound(machine: Machine) -> bool:
    speeds = list(machine.flops.values())
    return machine.kind == "gpu" or (set(machine.flops) == {"float32", "bfloat16"} and min(speeds) > 0)


def _dtype(run: Run, record: MachineRecord | None, machine: Machine) -> Dtype:
    if run.recipe.dtype != "auto":
        return run.recipe.dtype
    if record is None:
        return machine.dtype
    elsewhere = record.machine is not None and not record.machine.is_like(machine)
    if record.machine and elsewhere and record.dtype != machine.dtype:
        raise L0MoEError(
            f"{run.folder} was begun in {record.dtype} ({record.machine.words}), and dtype auto means {machine.dtype} "
            f"on this machine ({machine.words}); write dtype: {record.dtype} into the recipe to go on with it, or give "
            "the recipe another name."
        )
    return record.dtype


def _shapes(run: Run) -> Shapes:
    """Return [in, out] of a layer's large weights."""
    try:
        a = Architecture.from_hf(Path(run.recipe.model.path))
    except L0MoEError:
        return PLAIN_SHAPES
    hidden, ffn, query = a.hidden_size, a.ffn_hidden_size, a.num_attention_heads * a.head_dim
    return ((hidden, 2 * ffn), (ffn, hidden), (hidden, query), (query, hidden))


def _is_older(recipe: Path) -> bool:
    """Say whether a run was begun by a version whose recipes had no dtype."""
    try:
        return "dtype" not in read_json(recipe, DAMAGED)
    except L0MoEError:
        return False


def _without_threads() -> dict[str, str]:
    """All cores are measured, whatever the number of threads of this process is."""
    return {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}

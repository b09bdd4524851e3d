"""Step `control`: one expert of all domains, trained with each way to hold the retention, step by step.

The run is an expert run's in every respect but its data, the base's pretraining stream, which is long enough for as
many steps as an expert has in the paper. L = MoE layers.
"""

import shutil
import statistics

from base_step import STREAM
from methods_step import share_stage
from results import BASE, CONTROL, save
from runs_table import ControlSettings, RunsTable, chain_run
from settings import Place

from megatron_l0moe.chain import training_commands
from megatron_l0moe.recipe.layout import Flags, Layout
from megatron_l0moe.recipe.recipe import section_hash
from megatron_l0moe.reports.collect import Json, read_metrics
from megatron_l0moe.runs.child_process import run_command
from megatron_l0moe.runs.stages import Run
from megatron_l0moe.sizes.architecture import Architecture


def run_controls(place: Place, table: RunsTable) -> None:
    """Write results/control/NAME-SEED for every control of the table; a base that was there has no stream."""
    control = table.control
    if control is None or place.is_pretrained:
        return
    (case, *_) = table.cases([table.reference])
    run = chain_run(place, table, case)
    share_stage(place, run, "convert")
    inputs = (place.root / BASE, place.root / "tokens")
    for seed in control.seeds:
        for name, flags in control.flags.items():

            def work(name: str = name, seed: int = seed, flags: Flags = flags) -> Json:
                values = _trained(place, run, control, f"{name}-{seed}", {**flags, "l0-noise-seed": seed})
                return {"control": name, "seed": seed, **values}

            asked = section_hash(control.steps, flags, seed, run.recipe.expert_training.flags)
            save(place, f"{name}-{seed}", CONTROL, asked, inputs, work)


def _trained(place: Place, run: Run, control: ControlSettings, name: str, flags: Flags) -> Json:
    folder = place.root / "control" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    own = {"l0-data-index": str(place.root / "tokens" / STREAM), "bf16": True}
    trial = training_commands.Trial(layout=Layout(), steps=control.steps, folder=folder, flags=own | flags)
    job = training_commands.expert_job(run, Architecture.from_hf(place.base_model), 0, trial=trial)
    run_command(job.command, log=folder / "train.log", env=job.env)
    return summary(read_metrics(folder / "metrics.jsonl", "experts"))


def summary(rows: list[Json]) -> Json:
    """Return retention and schedule by step, how far they are apart, and the mean loss once the mask is frozen."""
    held = [row for row in rows if not row["frozen"]]
    apart = [[abs(r - row["retention_target"]) for r in row["retention"].values()] for row in held]
    return {
        "target": [row["retention_target"] for row in rows],
        "retention": [statistics.fmean(row["retention"].values()) for row in rows],
        "mean_distance": statistics.fmean(d for layers in apart for d in layers),
        "largest_distance": max(max(layers) for layers in apart),
        "frozen_loss": statistics.fmean(row["lm_loss"] for row in rows if row["frozen"]),
    }

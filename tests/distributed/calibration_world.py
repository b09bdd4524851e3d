"""Calibration passes of the tiny model in several layouts, compared with one process.

`torchrun --nproc-per-node N calibration_world.py FOLDER`: one process writes the start weights and the reference; two
go through the layouts and write FOLDER/results.json: the largest difference of any sum, by layout.
"""

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_l0moe.runtime import cpu

METHODS = ("magnitude", "obs", "coactivation")
SEQUENCES = 3
"""Odd, so that two data-parallel ranks have unequal shares."""


def main(folder: Path) -> None:
    """Write the reference (one process), or compare the layouts with it."""
    cpu.install()
    import torch
    from distributed.layouts import Layout

    torch.distributed.init_process_group("gloo")
    if torch.distributed.get_world_size() == 1:
        torch.save(_run(folder, Layout("1 process", 1), make=True), folder / "reference.pt")
    else:
        layouts = {
            "DP2": Layout("DP2", 2),
            "TP2": Layout("TP2", 2, tensor=2, sequence=False),
            "TP2 + SP": Layout("TP2 + SP", 2, tensor=2),
            "PP2": Layout("PP2", 2, pipeline=2),
            "DP2, sums not added": Layout("DP2", 2),
        }
        reference = torch.load(folder / "reference.pt")
        found = {
            name: _compare(_run(folder, layout, fault=name), reference) for name, layout in layouts.items()
        }
        if torch.distributed.get_rank() == 0:
            (folder / "results.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def _run(folder: Path, layout: Any, *, make: bool = False, fault: str = "") -> dict[str, Any]:
    """Return {"METHOD LAYER FIELD": tensor or number} of the layers that this rank owns."""
    import torch
    from distributed import layout_model, layout_steps
    from distributed.layouts import CASE
    from megatron.core import dist_checkpointing

    from megatron_l0moe.experts.construction import PAIRS, ConstructionSettings
    from megatron_l0moe.experts.unit_choice import CalibrationSums
    from megatron_l0moe.training import calibration_pass

    layout_steps._begin(layout)
    case = CASE["lagrangian"]
    result: dict[str, Any] = {}
    models = layout_model.build(layout, case)
    if make:
        layout_model.disturb(models[0])
        (folder / "start").mkdir()
        dist_checkpointing.save(layout_steps._sharded(models), folder / "start")
    loaded = dist_checkpointing.load(layout_steps._sharded(models), folder / "start")
    models[0].module.load_state_dict(loaded["model0"])
    reduce = CalibrationSums.reduce
    if "not added" in fault:
        CalibrationSums.reduce = lambda self, add_up: None  # type: ignore[method-assign]
    for method in (name for name in METHODS if name in PAIRS):
        gpt = layout_model.build(layout, case)[0].module.eval()  # hooks stay on a model
        gpt.load_state_dict(models[0].module.state_dict())
        settings = ConstructionSettings(
            method=method, width=8, expert=0, num_experts=2, top_k=2, damping=0.01, shared=0.5, seed=1
        )
        collector = calibration_pass.Collector(gpt, settings)
        result[f"{method} loss"] = calibration_pass.run_pass(
            gpt, layout_model.settings(case), _samples(), chunk=2
        )
        for layer, found in collector.calibrations():
            for field in fields(found):
                value = getattr(found, field.name)
                if value is not None:
                    result[f"{method} {layer} {field.name}"] = value
    CalibrationSums.reduce = reduce  # type: ignore[method-assign]
    assert torch.is_grad_enabled()
    return result


def _samples() -> Any:
    """Return SEQUENCES samples of random tokens, as (dataset, index)."""
    import torch
    from distributed.layout_model import SEQUENCE, VOCAB

    tokens = torch.randint(0, VOCAB, (SEQUENCES, SEQUENCE + 1), generator=torch.Generator().manual_seed(5))
    dataset = [
        {
            "tokens": row[:-1].contiguous(),
            "labels": row[1:].contiguous(),
            "loss_mask": torch.ones(SEQUENCE),
            "position_ids": torch.arange(SEQUENCE),
        }
        for row in tokens
    ]
    return [(dataset, index) for index in range(SEQUENCES)]


def _compare(own: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Return the largest relative difference over all ranks, and which of the reference's numbers no rank has."""
    import torch

    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, own)
    largest = 0.0
    for part in parts:
        for name, value in part.items():
            one, other = (torch.as_tensor(v).double() for v in (value, reference[name]))
            assert one.shape == other.shape, name
            largest = max(largest, float((one - other).abs().max() / other.abs().max()))
    return {
        "difference": largest,
        "missing": sorted(set(reference) - {name for part in parts for name in part}),
        "compared": len(reference),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))

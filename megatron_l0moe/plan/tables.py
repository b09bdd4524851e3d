"""The tables of `l0moe plan`, and its JSON."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_l0moe.plan import proposals
from megatron_l0moe.plan.plan import (
    TABLE5,
    RunPlan,
    StagePlan,
    Table5Row,
    disagreement,
    full_active,
    kv_cache_bytes,
    paper_total,
    recipe_keys,
)
from megatron_l0moe.plan.proposals import Candidate, Proposals, refusal_text
from megatron_l0moe.sizes.gpu_models import FRAGMENTATION, GIB, RESERVED_BYTES

SHOWN = 8
"""Layouts that are shown of those that fit."""
SHOWN_REFUSED = 4
MIN_WIDTH = 120
"""Columns of a table where the terminal, or a file, has fewer: layouts are not cut."""
GB = 1e9
TB = 1e12


def show(plan: RunPlan, console: Console) -> None:
    """Print a plan."""
    console.width = max(console.width, MIN_WIDTH)
    recipe, model = plan.recipe, plan.recipe.model
    a = plan.dense.architecture
    console.print(
        f"Plan of {recipe.name}: formulas, nothing was run. Model: {plan.source}.\n"
        f"{a.num_layers} layers, hidden {a.hidden_size}, FFN {a.ffn_hidden_size}; {model.dense_layers} dense + "
        f"{plan.moe.upper_layers} MoE layers of {model.num_experts} experts of width {model.expert_ffn}, "
        f"{model.top_k} for each token. GPU: {plan.gpu.name}.",
        soft_wrap=True,
    )
    if recipe.construction is not None:
        console.print(
            f"expert_training.method {recipe.expert_training.method} trains nothing: the numbers of the stage experts "
            "are those of method l0, an upper bound.",
            soft_wrap=True,
        )
    console.print(_parameters(plan))
    if row := _paper_row(plan):
        console.print(f"{disagreement(row) or 'Table 5 agrees with its text'}.", soft_wrap=True)
    console.print(_work(plan), _memory(plan))
    for stage in plan.stages:
        if stage.proposals is not None:
            _show_proposals(plan, stage, stage.proposals, console)
    if lines := layout_block(plan):
        text = "\n".join(["The fastest layouts as keys of the recipe:", "layouts:", *lines])
        console.print(text, soft_wrap=True, highlight=False, markup=False)
    console.print(_storage(plan), _speed(plan))
    console.print(_assumptions(plan), soft_wrap=True)


def as_json(plan: RunPlan) -> dict[str, Any]:
    """Return the numbers of a plan."""
    return {
        "recipe": plan.recipe.name,
        "model": plan.source,
        "gpu": dataclasses.asdict(plan.gpu) | {"usable": plan.gpu.usable},
        "gpus": plan.gpus,
        "parameters": {
            name: {
                "total": counts.total,
                "active": counts.active,
                "active_with_embedding": full_active(counts),
                "total_without_embedding": paper_total(counts),
            }
            for name, counts in (("dense", plan.dense.counts), ("l0moe", plan.moe.counts))
        },
        "stages": {stage.title: _stage_json(stage) for stage in plan.stages},
        "bytes": {
            "expert_store": plan.expert_store,
            "export": plan.export,
            "token_files": plan.token_files,
            "kv_cache_of_a_token": kv_cache_bytes(plan.moe),
        },
        "speed": {
            "prefill": dataclasses.asdict(plan.prefill),
            "context": plan.context,
            "decode": [dataclasses.asdict(row) for row in plan.decode],
        },
    }


def _stage_json(stage: StagePlan) -> dict[str, Any]:
    found = {
        "jobs": stage.job.jobs,
        "steps": stage.job.steps,
        "tokens": stage.tokens,
        "flops_of_a_token": dataclasses.asdict(stage.flops) | {"model": stage.flops.model},
        "model_flops": stage.flops.model * stage.tokens,
        "mfu": stage.mfu,
        "gpu_hours": stage.gpu_hours,
        "checkpoint_bytes": dataclasses.asdict(stage.checkpoint),
        "recipe": _candidate_json(stage.mine) | {"excess_bytes": stage.excess},
    }
    if stage.proposals is not None:
        found["proposals"] = [_candidate_json(one) for one in stage.proposals.fitting]
        found["refused"] = [
            _candidate_json(one.candidate)
            | {"excess_bytes": one.excess, "instead": one.instead and one.instead.text}
            for one in stage.proposals.refused
        ]
        found["broken_rules"] = [{"example": example, "layouts": n} for example, n in stage.proposals.broken]
    return found


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    return {
        "layout": candidate.layout.text,
        "processes": candidate.layout.processes,
        "recompute": candidate.recompute.text,
        "memory_bytes": dataclasses.asdict(candidate.memory) | {"total": candidate.memory.total},
        "step_seconds": candidate.time.seconds,
        "mfu": candidate.time.mfu,
        "jobs_at_once": candidate.at_once,
        "hours": candidate.hours,
    }


def _parameters(plan: RunPlan) -> Table:
    table = _table("Parameters, billions", "", "dense", "L0-MoE", right=(1, 2))
    dense, moe = plan.dense.counts, plan.moe.counts
    row = _paper_row(plan)
    for name, count in (
        ("total", lambda c: c.total),
        ("active for a token: LM head, no embedding look-up", lambda c: c.active),
        ("active with the embedding", full_active),
        ("the paper's way, total: without one embedding", paper_total),
    ):
        table.add_row(name, f"{count(dense) / GB:.2f}", f"{count(moe) / GB:.2f}")
    if row:
        printed = f"{row.total_billions:g} / {row.active_billions:g}"
        table.add_row("Table 5 (L0-MoE: total / active)", f"{row.dense_billions:g}", printed)
    return table


def _work(plan: RunPlan) -> Table:
    table = _table(
        "Work",
        *("stage", "jobs", "steps", "tokens", "GFLOP / token", "model FLOPs", "MFU", "GPU-hours"),
        right=range(1, 8),
    )
    for stage in plan.stages:
        table.add_row(
            stage.title,
            str(stage.job.jobs),
            f"{stage.job.steps:,}",
            f"{stage.tokens:,}",
            f"{stage.flops.model / GB:.1f}",
            f"{stage.flops.model * stage.tokens:.3g}",
            f"{stage.mfu:.0%} assumed",
            f"{stage.gpu_hours:,.0f}",
        )
    return table


def _memory(plan: RunPlan) -> Table:
    table = _table(
        f"Memory of the recipe's layouts, GiB a GPU (usable: {plan.gpu.usable / GIB:.1f})",
        *(
            "stage",
            "layout",
            "GPUs",
            "recomputation",
            "weights",
            "gradients",
            "optimizer",
            "activations",
            "total",
        ),
        right=(2, 4, 5, 6, 7, 8),
    )
    for stage in plan.stages:
        layout = stage.mine.layout
        total = f"{stage.mine.memory.total / GIB:.1f}{' too much' if stage.excess else ''}"
        table.add_row(
            stage.title,
            layout.text,
            str(layout.processes),
            stage.mine.recompute.text,
            *_sizes(stage.mine),
            total,
        )
    return table


def _show_proposals(plan: RunPlan, stage: StagePlan, found: Proposals, console: Console) -> None:
    title = f"{stage.title} on {plan.gpus} {plan.gpu.name}: {len(found.fitting)} layouts fit, fastest first"
    head = (
        "layout of a job",
        "GPUs",
        "at once",
        "recomputation",
        "GiB",
        "s / step",
        "bubble",
        "MFU",
        "hours",
    )
    table = _table(title, *head, right=(1, 2, 4, 5, 6, 7, 8))
    for one in found.fitting[:SHOWN]:
        table.add_row(
            one.layout.text,
            str(one.layout.processes),
            str(one.at_once),
            one.recompute.text,
            f"{one.memory.total / GIB:.1f}",
            f"{one.time.seconds:.2f}",
            f"{one.time.pipeline / one.time.seconds:.0%}",
            f"{one.time.mfu:.0%}",
            f"{one.hours:.1f}",
        )
    console.print(table)
    for refused in found.refused[:SHOWN_REFUSED]:
        console.print(f"Does not fit: {refusal_text(refused, plan.gpu)}.", soft_wrap=True)
    if len(found.refused) > SHOWN_REFUSED:
        console.print(f"{len(found.refused) - SHOWN_REFUSED} more do not fit (--json lists them).")
    for example, count in found.broken:
        console.print(f"Cannot work ({count} like it): {example}.", soft_wrap=True)


def _storage(plan: RunPlan) -> Table:
    table = _table("On disk", "", "GB", right=(1,))
    for stage in plan.stages:
        each = "a checkpoint of one expert run" if stage.job.jobs > 1 else "a checkpoint of MoE training"
        table.add_row(f"{each}, with optimizer state", f"{stage.checkpoint.total / GB:,.1f}")
    table.add_row(f"all {plan.recipe.model.num_experts} expert files", f"{plan.expert_store / GB:,.1f}")
    table.add_row("exported model", f"{plan.export / GB:,.1f}")
    table.add_row("curated token files", f"{plan.token_files / GB:,.1f}")
    return table


def _speed(plan: RunPlan) -> Table:
    table = _table(
        f"Expected speed against dense (above 1: faster), decode after {plan.context} tokens, one {plan.gpu.name}",
        *("", "by active", "by bytes read", "roofline", "dense tokens/s", "L0-MoE tokens/s"),
        right=range(1, 6),
    )
    prefill = plan.prefill
    table.add_row(f"prefill of {prefill.tokens}", f"{prefill.active:.2f}", "", f"{prefill.flops:.2f}", "", "")
    for row in plan.decode:
        table.add_row(
            f"decode, batch {row.batch}",
            f"{row.active:.2f}",
            f"{row.bytes_read:.2f}",
            f"{row.roofline:.2f}",
            f"{row.dense_tokens_per_second:,.0f}",
            f"{row.moe_tokens_per_second:,.0f}",
        )
    return table


def _assumptions(plan: RunPlan) -> str:
    return (
        f"Assumed, not measured: matrix products at {proposals.DENSE_EFFICIENCY:.0%} and experts at "
        f"{proposals.EXPERT_EFFICIENCY:.0%} of {plan.gpu.bf16_flops / TB:,.0f} TFLOP/s, links at "
        f"{proposals.LINK_EFFICIENCY:.0%}, {RESERVED_BYTES / GIB:.0f} GiB and {FRAGMENTATION:.0%} of the memory for "
        "CUDA, nccl and the allocator, and the MFU of GPU-hours, which count training only. The hours of proposed "
        "layouts are this simple model's: good for their order. Nothing was run on a GPU."
    )


def layout_block(plan: RunPlan) -> list[str]:
    """Return the fastest proposed layouts as a block of a recipe's `layouts`, in YAML; empty: one stage has none."""
    lines = [f"  {plan.gpus}:"]
    for stage in plan.stages:
        if stage.proposals is None or not stage.proposals.fitting:
            return []
        lines.append(f"    {stage.section}: {_inline(recipe_keys(stage.proposals.fitting[0]))}")
    return lines


def _inline(value: Any) -> str:
    """Return a mapping as one line of YAML."""
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{name}: {_inline(inner)}' for name, inner in value.items())} }}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _sizes(candidate: Candidate) -> tuple[str, ...]:
    memory = candidate.memory
    sizes = (memory.weights, memory.gradients, memory.optimizer, memory.activations + memory.working)
    return tuple(f"{size / GIB:.1f}" for size in sizes)


def _paper_row(plan: RunPlan) -> Table5Row | None:
    """Return the row of Table 5 that is about this model."""
    a, model = plan.dense.architecture, plan.recipe.model
    for row in TABLE5:
        base = row.architecture()
        mine = (a.family, a.hidden_size, a.ffn_hidden_size, a.num_layers, model.num_experts, model.expert_ffn)
        if mine == (
            base.family,
            base.hidden_size,
            base.ffn_hidden_size,
            base.num_layers,
            64,
            row.expert_ffn,
        ):
            return row
    return None


def _table(title: str, *columns: str, right: Any = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(Text(name), justify="right" if number in right else "left", no_wrap=True)
    return table

"""What `l0moe run RECIPE --launcher slurm --dry-run` shows: every job with its resources. Nothing is written."""

from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_l0moe.launch import sbatch
from megatron_l0moe.launch.preflight import check_sizes
from megatron_l0moe.launch.resources import TRAINING, Resources, experts_at_once, resources
from megatron_l0moe.launch.slurm_preflight import check_cluster, check_memory
from megatron_l0moe.launch.stages import stages
from megatron_l0moe.launch.submit import Request
from megatron_l0moe.plan.plan import find_architecture
from megatron_l0moe.recipe.recipe import Recipe
from megatron_l0moe.runs.stage_folder import is_done

HEADER = ("stage", "jobs", "nodes", "GPUs", "CPUs", "memory", "time", "after", "script")


def show_jobs(request: Request, say: Callable[[str], None]) -> None:
    """Print the plan, then what does not fit.

    Raises:
        L0MoEError: the recipe does not fit the model or the cluster.
    """
    architecture, source = find_architecture(request.run.recipe.model.path)
    check_sizes(request.run.recipe, architecture)
    check_cluster(request.run.recipe, request.cluster, request.selected)
    for line in describe_jobs(request, source):
        say(line)
    for spec in request.selected:  # what a script must not hold is found here
        sbatch.render(request.run, architecture, request.cluster, spec.name, sbatch.place_of(request.run))
    check_memory(request.run.recipe, request.cluster, request.selected)


def describe_jobs(request: Request, source: str) -> Iterator[str]:
    """Yield the lines of the plan."""
    run, cluster = request.run, request.cluster
    yield f"Run {run.recipe.name} in {run.folder}, cluster {request.cluster_file}."
    yield "This is a plan: nothing is submitted or written, and Slurm is not asked what is queued already."
    yield f"Sizes of the model: {source}."
    yield ""
    rows: list[tuple[str, ...]] = [HEADER]
    most = (0, "")
    waits_for = "-"
    for spec in request.selected:
        missing = [k for k, stage in enumerate(stages(run, spec.name)) if not is_done(stage)]
        if not missing:
            rows.append((spec.name, "done", *[""] * 7))
            continue
        need = resources(spec.name, run.recipe, cluster)
        at_once = min(experts_at_once(run.recipe, cluster), len(missing)) if spec.name == "experts" else 1
        rows.append(
            _row(spec.name, need, missing, at_once, waits_for, sbatch.place_of(run).script(spec.name))
        )
        most = max(most, (at_once * need.all_gpus, spec.name))
        waits_for = spec.name
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield ""
    for spec in request.selected:
        if spec.name in TRAINING:
            yield f"{spec.name}: {_training(spec.name, run.recipe, resources(spec.name, run.recipe, cluster))}"
    if most[0]:
        yield f"At most {most[0]} GPUs at the same time ({most[1]})."
    yield "Nodes, GPUs, CPUs and memory are those of one job; GPUs, CPUs and memory those of each of its nodes."
    yield "A job starts when the one before it has succeeded (experts: all of them), and is cancelled when that fails."
    yield _memory_line(request)


def _row(
    name: str, need: Resources, missing: list[int], at_once: int, after: str, script: Path
) -> tuple[str, ...]:
    jobs = f"{len(missing)}, {at_once} at once" if name == "experts" else "1"
    memory = {"0": "all", None: "default"}.get(need.memory, need.memory) or ""
    return (
        *(name, jobs, str(need.nodes), str(need.gpus), str(need.cpus), memory, need.time),
        *(f"afterok {after}" if after != "-" else "-", str(script)),
    )


def _training(name: str, recipe: Recipe, need: Resources) -> str:
    is_moe = name == "moe"
    steps = recipe.moe_steps if is_moe else recipe.expert_steps
    batch = recipe.moe_global_batch_size if is_moe else recipe.expert_training.global_batch_size
    tokens = steps * batch * recipe.data.seq_length
    processes = need.nodes * need.processes
    return (
        f"{processes} processes ({need.nodes} x {need.processes}), {recipe.parallel(TRAINING[name]).layout.text}; "
        f"{steps:,} steps of {batch} sequences of {recipe.data.seq_length} tokens = {tokens:,} tokens"
        + ("" if is_moe else " each")
    )


def _memory_line(request: Request) -> str:
    if request.cluster.gpus_per_node == 0:
        return "Memory was not checked: the cluster has no GPUs."
    if request.cluster.gpu is None:
        return "Memory was not checked: the cluster file does not say which GPU it has (gpu: h100, h200 or a100)."
    if (method := request.run.recipe.method) != "l0moe":
        return f"Memory was not checked: there is no formula for method {method}."
    return f"Memory was checked by formula for {request.cluster.gpu}, see `l0moe plan`."

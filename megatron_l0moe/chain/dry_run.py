"""What `l0moe run RECIPE` would do, stage by stage, as text: files, shapes, parameters, tokens, steps, commands.

With `--launcher slurm`: every job with its resources. Nothing is written.
"""

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_l0moe.chain import machine, preflight, training_commands
from megatron_l0moe.chain.forecast import forecast
from megatron_l0moe.chain.preflight import check_cluster, check_memory, check_sizes
from megatron_l0moe.chain.run_local import outlook
from megatron_l0moe.chain.slurm import sbatch
from megatron_l0moe.chain.slurm.cluster import Resources, experts_at_once, resources
from megatron_l0moe.chain.slurm.submit import Request
from megatron_l0moe.chain.training_commands import construct_job
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.methods.method import method_of, millions
from megatron_l0moe.plan.plan import find_architecture
from megatron_l0moe.recipe.layout import ParallelSection
from megatron_l0moe.recipe.recipe import Recipe
from megatron_l0moe.runs.stage_folder import MARKER, is_done
from megatron_l0moe.runs.stages import (
    TRAINING,
    Run,
    StageSpec,
    chain,
    folders,
    place_of,
    stage_command,
    stages,
)
from megatron_l0moe.sizes.architecture import Architecture, read_config
from megatron_l0moe.sizes.parameters import ParameterCounts, count_parameters

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
        sbatch.render(request.run, architecture, request.cluster, spec.name, place_of(request.run))
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
        rows.append(_row(spec.name, need, missing, at_once, waits_for, place_of(run).script(spec.name)))
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


Row = tuple[str, str]
NOT_KNOWN = "not known without the model"


class DryRun:
    """A run and what is known of its model before anything was computed."""

    def __init__(self, run: Run) -> None:
        """Read the model's config.json; without it sizes and training commands are left out, and that is said."""
        self.run = run
        self.missing = self.note = ""
        self.architecture: Architecture | None = None
        self.dense: ParameterCounts | None = None
        self.moe: ParameterCounts | None = None
        recipe = run.recipe
        self.method = method_of(recipe.method)
        try:
            self.architecture = Architecture.from_hf(Path(recipe.model.path))
        except L0MoEError as error:
            self.missing = NOT_KNOWN
            self.note = str(error)
            return
        preflight.check_sizes(recipe, self.architecture)
        config = read_config(Path(recipe.model.path))
        self.dense = count_parameters(config)
        self.moe = self.method.planned_counts(recipe, config)

    @property
    def dense_shapes(self) -> str:
        """Sizes of the dense model."""
        a = self.architecture
        if a is None:
            return self.missing
        return (
            f"{a.num_layers} layers, hidden {a.hidden_size}, FFN {a.ffn_hidden_size}, heads {a.num_attention_heads} / "
            f"{a.num_query_groups} KV of {a.head_dim}, vocabulary {a.vocab_size}"
        )

    @property
    def moe_shapes(self) -> str:
        """Sizes of the L0-MoE, or of what another method makes."""
        if self.architecture is None:
            return self.missing
        return self.method.shapes(self.run.recipe, self.architecture)

    @property
    def moe_parameters(self) -> str:
        """Weights of what is made beside those of the dense model."""
        if self.moe is None or self.dense is None:
            return self.missing
        return self.method.parameters(self.dense, self.moe)


def describe(run: Run, selected: tuple[StageSpec, ...]) -> list[str]:
    """Return the lines that `--dry-run` prints; nothing is started or written."""
    run, this_machine = machine.settle(run, keep=False)
    plan = DryRun(run)
    lines = [f"Run {run.recipe.name} in {run.folder}. This is a plan: nothing is started or written."]
    ahead = forecast(run.recipe, plan.architecture, this_machine) if plan.architecture else None
    lines += outlook(run, selected, this_machine, ahead)
    if plan.note:
        lines.append(f"Sizes and training commands are left out: {plan.note}")
    order = chain(run.recipe.method)
    for spec in selected:
        done = all((folder / MARKER).is_file() for folder in folders(run, spec.name))
        lines += ["", f"{order.index(spec) + 1}. {spec.name}: {spec.does}{' (done)' if done else ''}"]
        details: Callable[[DryRun], list[Row]] = globals()[f"_{spec.name}"]
        rows = [*details(plan), ("command", shlex.join(stage_command(run, spec.name)))]
        lines += [f"   {name:<11}{text}" for name, text in rows]
    return lines


def _convert(plan: DryRun) -> list[Row]:
    return [
        ("in", plan.run.recipe.model.path),
        ("out", str(plan.run.stage_folder("convert") / "megatron")),
        ("shapes", plan.dense_shapes),
        ("parameters", millions(plan.dense.total) if plan.dense else plan.missing),
    ]


def _curate(plan: DryRun) -> list[Row]:
    data, k = plan.run.recipe.data, plan.run.recipe.model.num_experts
    out = plan.run.stage_folder("curate")
    passes = f" gone through {data.set_passes} times" if data.set_passes > 1 else ""
    use = (
        "for the experts"
        if plan.run.recipe.method == "l0moe"
        else "for the set that the others are ordered by"
    )
    return [
        ("in", f"{data.corpus}, embedding model {data.embedding_model}"),
        ("out", f"{out}/iter_*/, expert_*.ccm.*, moe.ccm.*, heldout.jsonl, clusters.npz, ccm.json"),
        (
            "shapes",
            f"Q = {data.iterations} iterations of K = {k} clusters, sequences of {data.seq_length} tokens",
        ),
        (
            "tokens",
            f"{data.tokens_per_expert * k:,} {use} ({data.tokens_per_expert:,} each), "
            f"{data.iterations - 1} ordered sets of {data.tokens_per_set:,}{passes}, "
            f"{data.heldout_tokens_per_domain:,} held out of each source domain",
        ),
        (
            "tasks",
            f"{data.executor.tasks or data.executor.workers} a step, {data.executor.kind}, "
            f"{data.executor.workers} at a time",
        ),
    ]


def _experts(plan: DryRun) -> list[Row]:
    run, recipe = plan.run, plan.run.recipe
    steps, batch = recipe.expert_steps, recipe.expert_training.global_batch_size
    work = ("steps", _steps(steps, batch, recipe.data.seq_length) + " for each expert")
    make: Callable[[Run, Architecture, int], training_commands.TrainingCommand] = training_commands.expert_job
    if recipe.construction is not None:
        sequences = recipe.calibration_sequences
        tokens = f"{sequences} sequences of {recipe.data.seq_length} tokens through the dense model for each expert"
        work = ("method", f"{recipe.expert_training.method}, nothing is trained; {tokens}")
        make = construct_job
    rows = [
        ("in", f"{run.stage_folder('convert')}/megatron, {run.stage_folder('curate')}/expert_*.ccm.*"),
        ("out", f"{run.stage_folder('experts')}/*/expert.safetensors"),
        (
            "shapes",
            f"{recipe.model.num_experts} runs; the FFN of each MoE layer is cut to {recipe.model.expert_ffn} units",
        ),
        ("parameters", f"{millions(plan.dense.total)} in memory" if plan.dense else plan.missing),
        work,
        ("layout", _layout(recipe.expert_training.parallel)),
    ]
    if plan.architecture is None:
        return [*rows, ("runs", plan.missing)]
    last = recipe.model.num_experts - 1
    job = make(run, plan.architecture, 0)
    return [*rows, ("runs", f"for experts 000 to {last:03d}, here for 000:"), ("", shell_line(job))]


def _assemble(plan: DryRun) -> list[Row]:
    return [
        (
            "in",
            f"{plan.run.stage_folder('convert')}/megatron, {plan.run.stage_folder('experts')}/*/expert.safetensors",
        ),
        ("out", f"{plan.run.stage_folder('assemble')}/megatron"),
        ("shapes", plan.moe_shapes),
        ("parameters", plan.moe_parameters),
    ]


def _moe(plan: DryRun) -> list[Row]:
    run, recipe = plan.run, plan.run.recipe
    start = "assemble" if recipe.method == "l0moe" else "convert"
    rows = [
        ("in", f"{run.stage_folder(start)}/megatron, {run.stage_folder('curate')}/moe.ccm.*"),
        ("out", f"{run.stage_folder('moe')}/checkpoints"),
        ("shapes", plan.moe_shapes),
        ("parameters", plan.moe_parameters),
        ("steps", _steps(recipe.moe_steps, recipe.moe_global_batch_size, recipe.data.seq_length)),
        ("layout", _layout(recipe.moe_training.parallel)),
    ]
    if plan.architecture is None:
        return [*rows, ("runs", plan.missing)]
    return [*rows, ("runs", ""), ("", shell_line(training_commands.moe_job(run, plan.architecture)))]


def _export(plan: DryRun) -> list[Row]:
    files = "config.json, *.safetensors, tokenizer, README.md"
    if plan.method.exported_code:
        files += f", {plan.method.exported_code}"
    target = plan.run.recipe.export.target if plan.run.recipe.method == "l0moe" else "transformers"
    return [
        ("in", f"{plan.run.stage_folder('moe')}/checkpoints, tokenizer of {plan.run.recipe.model.path}"),
        (
            "out",
            f"{plan.run.stage_folder('export')}: {files}, for {target}",
        ),
        ("shapes", plan.moe_shapes),
        ("parameters", plan.moe_parameters),
    ]


def _evaluate(plan: DryRun) -> list[Row]:
    run, evaluation = plan.run, plan.run.recipe.evaluation
    models = [run.recipe.model.path, str(run.stage_folder("export"))]
    if run.recipe.method == "l0moe":
        models.append(f"{run.stage_folder('assemble')}/megatron")
    return [
        ("in", ", ".join(models)),
        ("out", f"{run.stage_folder('evaluate')}/perplexity.json, speed.json, parity.json"),
        (
            "shapes",
            f"{evaluation.dtype}; prefill of {evaluation.prefill_tokens} tokens, decode of {evaluation.decode_tokens}, "
            f"{evaluation.repeats} repeats; parity on {evaluation.parity_positions} positions",
        ),
    ]


def _report(plan: DryRun) -> list[Row]:
    return [
        ("in", f"everything in {plan.run.folder}"),
        ("out", f"{plan.run.stage_folder('report')}/report.html, {plan.run.folder}/summary.json"),
    ]


def shell_line(job: training_commands.TrainingCommand) -> str:
    """Return a job as one line for a shell, variables first."""
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in job.env.items())
    # A word that starts with $ is for the shell of a batch job to fill in.
    words = " ".join(f'"{word}"' if word.startswith("$") else shlex.quote(word) for word in job.command)
    return f"{variables} {words}"


def _steps(steps: int, batch: int, length: int) -> str:
    return f"{steps:,} steps of {batch} sequences of {length} tokens = {steps * batch * length:,} tokens"


def _layout(parallel: ParallelSection) -> str:
    return (
        f"{parallel.processes} processes on {parallel.nodes} node(s): tensor {parallel.tensor}, pipeline "
        f"{parallel.pipeline}, expert {parallel.expert}, data {parallel.layout.data}; {parallel.layout.text}"
    )

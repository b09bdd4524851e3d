"""Benchmarks of the evaluate stage: the LM evaluation harness on the dense model and the L0-MoE, side by side.

Both models get one `HarnessCall`, which differs in the checkpoint folder only; that the prompts and targets were the
same is checked on the results. A task that is finished for a model is not run again.

Scores are compared by difference and ratio, with standard errors that use the pairing: both models answer the same
documents, so an error of the two scores taken as independent would be too large.

    difference  M - D     variance  sum_k w_k^2 S^2_k(m - d) / n_k
    ratio       r = M / D variance  sum_k w_k^2 S^2_k(m - r d) / (n_k D^2)

with S^2_k the sample variance (divisor n_k - 1) in task k. The second is the linearised (delta method) variance of
a ratio of means of paired values (Cochran, Sampling Techniques, 3rd edition, chapter 6).

Legend: d_i, m_i value of document i for the dense model and the L0-MoE; D, M their means; n documents of a task.
A group is the mean over its tasks weighted by their documents, w_k = n_k / N; a task alone has one weight, 1.
"""

import logging
import math
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.evaluation.harness import code_execution
from megatron_l0moe.evaluation.harness.lm_eval_call import (
    HarnessCall,
    check_installed,
    common_length,
    environment,
    is_finished,
    model_arguments,
)
from megatron_l0moe.evaluation.harness.tasks import Tasks, find_tasks, write_task_files
from megatron_l0moe.recipe.recipe import Recipe, section_hash
from megatron_l0moe.recipe.sections import BenchmarkSection
from megatron_l0moe.runs.child_process import USER_ERROR_EXIT, CommandFailedError, run_command
from megatron_l0moe.runs.lock import inherited
from megatron_l0moe.runs.stage_folder import sha256_file, write_json
from megatron_l0moe.runtime.json_files import read_json

logger = logging.getLogger(__name__)

Pairs = Sequence[tuple[float, float]]
"""(dense, L0-MoE) values of one task's documents."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and its standard error; None: not defined."""

    value: float | None
    stderr: float | None

    def to_json(self) -> dict[str, float | None]:
        """Return a plain dict."""
        return {"value": self.value, "stderr": self.stderr}


def difference(tasks: Sequence[Pairs]) -> Estimate:
    """Return the L0-MoE's mean minus the dense model's."""
    return Estimate(
        value=_mean(tasks, 1) - _mean(tasks, 0),
        stderr=_stderr([[moe - dense for dense, moe in pairs] for pairs in tasks]),
    )


def ratio(tasks: Sequence[Pairs]) -> Estimate:
    """Return the L0-MoE's mean / the dense model's; not defined where the dense model scores 0."""
    dense_mean = _mean(tasks, 0)
    if dense_mean == 0.0:
        return Estimate(value=None, stderr=None)
    value = _mean(tasks, 1) / dense_mean
    stderr = _stderr([[moe - value * dense for dense, moe in pairs] for pairs in tasks])
    return Estimate(value=value, stderr=None if stderr is None else stderr / abs(dense_mean))


def _mean(tasks: Sequence[Pairs], which: int) -> float:
    """Return the mean over all documents of all tasks, which is the mean weighted by the tasks' documents."""
    values = [pair[which] for pairs in tasks for pair in pairs]
    return math.fsum(values) / len(values)


def _stderr(tasks: Sequence[Sequence[float]]) -> float | None:
    """Return the standard error of the mean over all values, stratified by task; None with one value in a task."""
    if any(len(values) < 2 for values in tasks):
        return None
    total = sum(len(values) for values in tasks)
    return math.sqrt(math.fsum(len(values) * statistics.variance(values) for values in tasks)) / total


Json = dict[str, Any]
MODELS = ("dense", "l0moe")
MEAN_TOLERANCE = 1e-9
"""Between our mean of the documents' values and the harness' score: rounding only."""


def run_benchmarks(
    section: BenchmarkSection, dense: Path, l0moe: Path, folder: Path, *, dtype: str, device: str
) -> Json:
    """Run every task on both models, those that are not finished yet, and put the scores side by side.

    Args:
        section: the recipe's `evaluation.benchmarks`.
        dense: folder of the dense checkpoint.
        l0moe: folder of the exported L0-MoE.
        folder: MODEL/TASK.json, MODEL/TASK.samples.jsonl and MODEL.log are written and looked for here.

    Returns:
        The content of evaluate/benchmarks.json.

    Raises:
        L0MoEError: something is missing, or the harness failed; one sentence.
    """
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    try:
        tasks, data = prepare(section, work / "tasks")
        if tasks.runs_code:
            logger.warning(
                "evaluation.benchmarks.allow_code_execution is true: programs that the models write are run, "
                "isolated, for %s.",
                ", ".join(tasks.runs_code),
            )
        length = common_length((dense, l0moe), section.max_length)
        for name, model in zip(MODELS, (dense, l0moe), strict=True):
            arguments = model_arguments(section, model, dtype=dtype, device=device, max_length=length)
            call = _call(section, tasks, work, folder / name, arguments, data)
            _run(call, folder, name, offline=section.local_data is not None)
    finally:
        shutil.rmtree(work, ignore_errors=True)  # copies of the data
    del arguments["pretrained"]
    return {
        "harness": {"name": "lm-evaluation-harness", "version": version("lm-eval")},
        "backend": section.backend,
        "arguments": arguments,
        "models": dict(zip(MODELS, (str(dense), str(l0moe)), strict=True)),
        "limit": section.limit,
        "data": data or "as the harness fetches it",
        "code_execution": code_execution.describe() if tasks.runs_code else {"allowed": False},
        **compare({name: _records(folder / name, section.tasks) for name in MODELS}),
    }


def prepare(section: BenchmarkSection, folder: Path) -> tuple[Tasks, Json]:
    """Look up the tasks, write their files and documents to `folder`, and try what they need; also before a run.

    Returns:
        The tasks, and what is known of their local documents.

    Raises:
        L0MoEError: something is missing or not permitted; one sentence.
    """
    check_installed(section)
    tasks = find_tasks(
        section.tasks,
        local=section.local_data is not None,
        allow_code_execution=section.allow_code_execution,
    )
    if tasks.runs_code:
        code_execution.check_available()
    local_data = None if section.local_data is None else Path(section.local_data)
    return tasks, write_task_files(tasks, folder, local_data=local_data, num_fewshot=section.num_fewshot)


def run_in_chain(recipe: Recipe, section: BenchmarkSection, run: Path, out: Path) -> dict[str, object]:
    """Run the benchmarks of a run and write `out`/benchmarks.json; returns the headline numbers for the manifest.

    The tasks' results lie outside the stage's folder, which is emptied when the stage starts again.
    """
    from megatron_l0moe.runtime.cpu import device

    result = run_benchmarks(
        section,
        Path(recipe.model.path),
        run / "export",
        run / "benchmarks",
        dtype=recipe.evaluation.dtype,
        device=str(device()),
    )
    write_json(out / "benchmarks.json", result)
    headline = {
        f"{row['task']} {row['metric']},{row['filter']}": [row[name]["value"] for name in (*MODELS, "ratio")]
        for row in result["rows"]
        if row["headline"]
    }
    return {"benchmarks": {"dense, l0moe, ratio": headline}}


def compare(records: dict[str, list[Json]]) -> Json:
    """Put both models' scores side by side.

    Args:
        records: by model, what `lm_eval_call.to_record` made of each requested task, in the same order.

    Returns:
        `rows`, and `seconds` by model and requested task.
    """
    rows = []
    for dense, moe in zip(records["dense"], records["l0moe"], strict=True):
        for key in ("prompts", "documents", "fewshot", "versions", "generation"):
            if dense[key] != moe[key]:
                raise L0MoEError(
                    f"The two models did not get the same {key} in the task {dense['task']}; remove the run's "
                    "folder benchmarks and run the evaluate stage again."
                )
        theirs = {(row["task"], row["metric"], row["filter"]): row for row in moe["scores"]}
        for row in dense["scores"]:
            rows.append(_row(row, theirs[row["task"], row["metric"], row["filter"]], dense, moe))
    seconds = {
        name: {record["task"]: record["seconds"] for record in found} for name, found in records.items()
    }
    return {"rows": rows, "seconds": seconds}


def _row(ours: Json, theirs: Json, dense: Json, moe: Json) -> Json:
    name = ours["task"]
    members = dense["members"][name]
    metric = f"{ours['metric']},{ours['filter']}"
    documents = sum(dense["documents"][leaf] for leaf in members)
    pairs: list[Pairs] = [
        list(zip(dense["values"][leaf][metric], moe["values"][leaf][metric], strict=True))
        for leaf in members
        if metric in dense["values"][leaf]
    ]
    if _is_mean(ours["value"], pairs, 0) and _is_mean(theirs["value"], pairs, 1):
        apart, relative = difference(pairs), ratio(pairs)
    else:  # not a mean over documents, such as a group that weighs its tasks alike
        apart = Estimate(value=theirs["value"] - ours["value"], stderr=None)
        relative = Estimate(value=theirs["value"] / ours["value"] if ours["value"] else None, stderr=None)
    return {
        "requested": dense["task"],
        "task": name,
        "headline": name == dense["task"] or dense["task"] not in dense["members"],
        "metric": ours["metric"],
        "filter": ours["filter"],
        "tasks": len(members),
        "documents": documents,
        "all_documents": sum(dense["all_documents"][leaf] for leaf in members),
        "fewshot": sorted({dense["fewshot"][leaf] for leaf in members}),
        "version": sorted({str(dense["versions"][leaf]) for leaf in members}),
        "dense": {"value": ours["value"], "stderr": ours["stderr"]},
        "l0moe": {"value": theirs["value"], "stderr": theirs["stderr"]},
        "difference": apart.to_json(),
        "ratio": relative.to_json(),
    }


def _is_mean(score: float, tasks: list[Pairs], which: int) -> bool:
    values = [pair[which] for pairs in tasks for pair in pairs]
    return bool(values) and abs(sum(values) / len(values) - score) < MEAN_TOLERANCE


def _call(
    section: BenchmarkSection, tasks: Tasks, work: Path, results: Path, arguments: Json, data: Json
) -> HarnessCall:
    model = Path(arguments["pretrained"])
    weights = [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(model.glob("*.safetensors"))
    ]
    settings = section.model_dump(exclude={"tasks", "local_data"})
    model_files = [sha256_file(model / "config.json"), weights]
    keys = {
        task: section_hash(
            task, settings, arguments, model_files, version("lm-eval"), [data.get(leaf) for leaf in leaves]
        )
        for task, leaves in tasks.members.items()
    }
    return HarnessCall(
        backend=section.backend,
        model_arguments=arguments,
        tasks=list(section.tasks),
        indexed=[*(str(folder) for folder in tasks.indexed), str(work / "tasks")],
        num_fewshot=section.num_fewshot,
        limit=section.limit,
        allow_code_execution=bool(tasks.runs_code),
        keys=keys,
        results=str(results),
    )


def _run(call: HarnessCall, folder: Path, name: str, *, offline: bool) -> None:
    """Let a process of its own carry out the call, if a task is left."""
    if all(is_finished(Path(call.results) / f"{task}.json", call.keys[task]) for task in call.tasks):
        logger.info("benchmarks of %s are done.", name)
        return
    file = folder / "work" / f"{name}.json"
    write_json(file, call.to_json())
    logger.info("benchmarks of %s: %s", name, ", ".join(call.tasks))
    try:
        run_command(
            [sys.executable, "-m", "megatron_l0moe.evaluation.harness.lm_eval_call", str(file)],
            log=folder / f"{name}.log",
            env=environment(offline=offline, cache=folder / "work" / "cache", code=call.allow_code_execution),
            keep_open=inherited(),
        )
    except CommandFailedError as failure:
        if failure.code == USER_ERROR_EXIT:
            raise L0MoEError(failure.last_line) from failure
        raise L0MoEError(f"The harness failed on the {name} model. {failure}") from failure


def _records(folder: Path, names: list[str]) -> list[Json]:
    return [read_json(folder / f"{name}.json", "remove it to run the task again") for name in names]

"""Carries out one `HarnessCall`: `python -m megatron_l0moe.evaluation.harness_process CALL.json`.

The model is loaded once, and only if a task is left to do. Each task's numbers are written as soon as they are
there, so a rerun goes on with the next one.
"""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.evaluation.harness import HarnessCall
from megatron_l0moe.runs.stage_folder import write_json, write_text
from megatron_l0moe.runtime.json_files import read_json

logger = logging.getLogger(__name__)

Json = dict[str, Any]


def is_finished(file: Path, key: str) -> bool:
    """Say whether a task's result is there and was made with these settings."""
    return file.is_file() and read_json(file, "remove it to run the task again").get("key") == key


def carry_out(call: HarnessCall) -> None:
    """Run the tasks that are not finished, one after the other."""
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    results = Path(call.results)
    left = [task for task in call.tasks if not is_finished(results / f"{task}.json", call.keys[task])]
    if not left:
        return
    manager = TaskManager(include_defaults=False, include_path=call.indexed)
    model = get_model(call.backend)(**call.model_arguments)
    for task in left:
        started = time.monotonic()
        logger.info("benchmark %s", task)
        found = simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=manager,
            num_fewshot=call.num_fewshot,
            limit=call.limit,
            log_samples=True,
            confirm_run_unsafe_code=call.allow_code_execution,
        )
        if found is None:  # another process of this engine writes the result
            continue
        record = to_record(task, found)
        seconds = round(time.monotonic() - started, 3)
        write_text(results / f"{task}.samples.jsonl", _samples(found["samples"]))
        write_json(results / f"{task}.json", {"key": call.keys[task], **record, "seconds": seconds})


def to_record(task: str, found: Json) -> Json:
    """Return what we keep of the harness' results: its scores as they are, and each document's value.

    Returns:
        `scores`: a row {task, metric, filter, value, stderr} for each metric of each task and of the group;
        `values`: by task and `metric,filter` the documents' values in their order;
        `prompts`: by task a hash of all prompts and targets; `documents`, `fewshot`, `versions`, `members`.
    """
    leaves = sorted(found["samples"])
    numbers = {**found.get("groups", {}), **{leaf: found["results"][leaf] for leaf in leaves}}
    return {
        "task": task,
        "harness": found.get("lm_eval_version"),
        "scores": [row for name, metrics in numbers.items() for row in _rows(name, metrics)],
        "members": {name: _members(name, found["group_subtasks"], leaves) for name in numbers},
        "documents": {leaf: found["n-samples"][leaf]["effective"] for leaf in leaves},
        "all_documents": {leaf: found["n-samples"][leaf]["original"] for leaf in leaves},
        "fewshot": {leaf: found["n-shot"][leaf] for leaf in leaves},
        "versions": {leaf: found["versions"][leaf] for leaf in leaves},
        "generation": {leaf: found["configs"][leaf].get("generation_kwargs") for leaf in leaves},
        "values": {leaf: _values(found["samples"][leaf]) for leaf in leaves},
        "prompts": {leaf: _prompts(found["samples"][leaf]) for leaf in leaves},
    }


def _rows(name: str, metrics: Json) -> list[Json]:
    """Turn `{"acc,none": 0.5, "acc_stderr,none": 0.1}` into rows; the harness' "N/A" becomes None."""
    rows = []
    for key, value in metrics.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = metrics.get(f"{metric}_stderr,{filter_name}")
        rows.append(
            {
                "task": name,
                "metric": metric,
                "filter": filter_name,
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, int | float) else None,
            }
        )
    return rows


def _members(name: str, subtasks: dict[str, list[str]], leaves: list[str]) -> list[str]:
    if name in leaves:
        return [name]
    return sorted({leaf for child in subtasks.get(name, []) for leaf in _members(child, subtasks, leaves)})


def _values(samples: list[Json]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        for metric in sample["metrics"]:
            if isinstance(sample[metric], int | float):
                values.setdefault(f"{metric},{sample['filter']}", []).append(float(sample[metric]))
    return values


def _prompts(samples: list[Json]) -> str:
    import hashlib

    parts = sorted(
        f"{sample['doc_id']} {sample['prompt_hash']} {sample['target_hash']}" for sample in samples
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _samples(samples: dict[str, list[Json]]) -> str:
    """Return one line for each document and filter: what the model answered and what it scored."""
    lines = [
        json.dumps(
            {
                "task": leaf,
                "document": sample["doc_id"],
                "filter": sample["filter"],
                "answers": sample["resps"],
                "filtered": sample["filtered_resps"],
                **{metric: sample[metric] for metric in sample["metrics"]},
            },
            default=str,
        )
        for leaf, rows in sorted(samples.items())
        for sample in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Read the call that the command line names and carry it out."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s | %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("megatron_l0moe").setLevel(logging.INFO)
    try:
        carry_out(HarnessCall.read(Path(sys.argv[1])))
    except L0MoEError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

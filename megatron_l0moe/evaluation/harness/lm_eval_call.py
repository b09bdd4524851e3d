"""One call of the LM evaluation harness: backend, model arguments, tasks. The same for both models but for the folder.

The call is written to a file and carried out in a process of its own, `python -m
megatron_l0moe.evaluation.harness.lm_eval_call CALL.json`, so that an engine's memory is free again when the next
model's turn comes, and so that the switches which the libraries read on import can be set. The model is loaded once,
and only if a task is left to do. Each task's numbers are written as soon as they are there, so a rerun goes on with the
next one.
"""

import importlib.util
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.sections import BenchmarkSection
from megatron_l0moe.runs.stage_folder import write_json, write_text
from megatron_l0moe.runtime.json_files import read_json
from megatron_l0moe.sizes.architecture import read_config

logger = logging.getLogger(__name__)

RESERVED = ("pretrained", "trust_remote_code", "dtype", "batch_size", "device")
LENGTH_ARGUMENT = {"hf": "max_length", "vllm": "max_model_len", "sglang": "context_length"}
PACKAGE = {"hf": "transformers", "vllm": "vllm", "sglang": "sglang"}


@dataclass(frozen=True, kw_only=True)
class HarnessCall:
    """What the process is to do with one model."""

    backend: str
    model_arguments: dict[str, Any]
    """Keyword arguments of the harness' model class."""
    tasks: list[str]
    indexed: list[str]
    """Folders of task files; a later one replaces tasks of an earlier one."""
    num_fewshot: int | None
    limit: int | None
    allow_code_execution: bool
    keys: dict[str, str]
    """A hash by task of everything that can change its scores; results with another one are not reused."""
    results: str
    """Folder that gets TASK.json, and TASK.samples.jsonl with what the model answered."""

    @classmethod
    def read(cls, file: Path) -> "HarnessCall":
        """Read a call that `write` wrote."""
        return cls(**read_json(file, "run the evaluate stage again"))

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict."""
        return asdict(self)


def model_arguments(
    section: BenchmarkSection, folder: Path, *, dtype: str, device: str, max_length: int
) -> dict[str, Any]:
    """Return the keyword arguments of the harness' model class for a checkpoint folder.

    Args:
        section: backend, batch size and further arguments.
        folder: the checkpoint; the only argument that is not the same for both models.
        device: such as `cpu` or `cuda`; vLLM and SGLang choose by themselves.
        max_length: tokens of prompt and answer together.
    """
    for name in section.backend_arguments:
        if name in RESERVED or name in LENGTH_ARGUMENT.values():
            raise L0MoEError(
                f"evaluation.benchmarks.backend_arguments.{name} is set by this command; use evaluation.dtype, "
                "evaluation.benchmarks.batch_size or max_length, or leave it out."
            )
    arguments: dict[str, Any] = {
        "pretrained": str(folder),
        "dtype": dtype,
        "trust_remote_code": False,
        LENGTH_ARGUMENT[section.backend]: max_length,
        "batch_size": section.batch_size,
    }
    if section.backend == "hf":
        arguments["device"] = device
    return arguments | section.backend_arguments


def common_length(folders: Sequence[Path], wanted: int | None) -> int:
    """Return the tokens that every model can take, or `wanted` if it is not more.

    Raises:
        L0MoEError: a checkpoint does not say, or takes less than `wanted`.
    """
    lengths = {}
    for folder in folders:
        config = read_config(folder)
        length = config.get("max_position_embeddings")
        if not isinstance(length, int):
            raise L0MoEError(
                f"{folder / 'config.json'} has no max_position_embeddings; export the model again."
            )
        lengths[folder] = length
    shortest = min(lengths, key=lambda folder: lengths[folder])
    if wanted is not None and wanted > lengths[shortest]:
        raise L0MoEError(
            f"evaluation.benchmarks.max_length ({wanted}) must be at most the {lengths[shortest]} positions of "
            f"{shortest}."
        )
    return wanted or lengths[shortest]


def environment(*, offline: bool, cache: Path, code: bool) -> Mapping[str, str]:
    """Return the variables of the harness' process.

    Args:
        offline: nothing may be fetched.
        cache: where `datasets` puts what it makes from local copies.
        code: whether programs are executed, which the harness wants to be told twice.
    """
    variables = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if offline:
        variables |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
        variables |= {"HF_DATASETS_CACHE": str(cache.resolve())}
    return variables | ({"HF_ALLOW_CODE_EVAL": "1"} if code else {})


def check_installed(section: BenchmarkSection) -> None:
    """Refuse a backend whose packages are not there, before any work is done."""
    if importlib.util.find_spec("lm_eval") is None:
        raise L0MoEError(
            "evaluation.benchmarks needs the LM evaluation harness, which is not installed; install the extra "
            "with pip install 'megatron-l0moe[evaluation]', or remove the section."
        )
    if importlib.util.find_spec(PACKAGE[section.backend]) is None:
        raise L0MoEError(
            f"evaluation.benchmarks.backend {section.backend!r} needs the package {PACKAGE[section.backend]}, which is "
            "not installed in this environment; use 'hf', or install it beside the harness."
        )
    if section.local_data is not None and not Path(section.local_data).is_dir():
        raise L0MoEError(
            f"evaluation.benchmarks.local_data: the folder {section.local_data} does not exist; give the folder of "
            "local copies, see docs/evaluate.md for its layout."
        )


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

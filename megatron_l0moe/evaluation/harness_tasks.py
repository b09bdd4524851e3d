"""Which tasks of the evaluation harness a recipe names, and the task files that we put over the harness' own ones.

A file of ours has the name of the harness' task, so that it takes its place, alone and inside its group, and
`include`s the harness' own file: prompt, few-shot examples, stop sequences, filters and metric stay the harness'
own. It differs in two points only: where the documents come from (local copies), and for HumanEval which
functions run the programs (`code_execution.py`).
"""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_l0moe.errors import L0MoEError, nearest
from megatron_l0moe.evaluation.local_data import READERS, Splits, read_splits
from megatron_l0moe.runs.stage_folder import write_text

LOCAL_FOLDERS = ("gsm8k", "bbh", "mmlu", "humaneval")
"""Folders of the harness' tasks with data sets that local copies can stand in for."""
OWN_FUNCTIONS = ("pass_at_k", "build_predictions", "build_predictions_instruct")
"""Functions of the harness' HumanEval that `code_execution.py` has too."""

Config = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """The tasks to run and what they are made of."""

    members: dict[str, list[str]]
    """By requested name: the tasks in it, itself where it is no group."""
    configs: dict[str, Config]
    """By task: the harness' own settings, functions as text."""
    files: dict[str, Path]
    """By task: the harness' own file."""
    indexed: tuple[Path, ...]
    """Folders of task files that are enough to find them all; the harness' whole index takes 17 s."""
    runs_code: list[str] = field(default_factory=list)
    """Tasks that execute what the model wrote."""


def find_tasks(names: Iterable[str], *, local: bool, allow_code_execution: bool) -> Tasks:
    """Look up tasks by the harness' own names of tasks, groups and tags.

    Args:
        local: only tasks that local copies can serve.
        allow_code_execution: whether tasks that execute model output may be there.

    Raises:
        L0MoEError: a name is unknown, a task has no local form, or it would execute model output without leave.
    """
    root = harness_root()
    wanted = list(names)
    folders = tuple(root / name for name in LOCAL_FOLDERS)
    index = _index(folders)
    if not local and any(name not in index for name in wanted):
        folders, index = (root,), _index((root,))
    for name in wanted:
        if name not in index:
            where = (
                "local copies can stand in for: gsm8k, bbh, mmlu, humaneval and their parts"
                if local
                else "the harness has"
            )
            raise L0MoEError(
                f"evaluation.benchmarks.tasks: {name!r} is no task that {where}{nearest(name, index)}."
            )
    members = {name: sorted(_leaves(name, index)) for name in wanted}
    leaves = {leaf for names in members.values() for leaf in names}
    configs = {leaf: index[leaf].cfg for leaf in sorted(leaves)}
    runs_code = [leaf for leaf, config in configs.items() if config.get("unsafe_code")]
    _check_code(runs_code, configs, allow_code_execution)
    return Tasks(
        members=members,
        configs=configs,
        files={leaf: index[leaf].yaml_path for leaf in configs},
        indexed=folders,
        runs_code=runs_code,
    )


def write_task_files(
    tasks: Tasks, folder: Path, *, local_data: Path | None, num_fewshot: int | None
) -> dict[str, dict[str, object]]:
    """Write the task files that take the place of the harness' own ones, and the documents they name.

    Args:
        folder: TASK.yaml and, from local copies, TASK.SPLIT.jsonl are written here.
        local_data: the folder of local copies; None: the harness fetches its data sets.
        num_fewshot: few-shot examples asked for; None: the task's own number.

    Returns:
        For each task with local documents {split: file, sha256, number of documents}.

    Raises:
        L0MoEError: a local copy is missing, broken or not enough for the few-shot examples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    used: dict[str, dict[str, object]] = {}
    for name, config in tasks.configs.items():
        ours: Config = {}
        if local_data is not None:
            if config.get("dataset_path") not in READERS:
                raise L0MoEError(
                    f"The task {name} reads {config.get('dataset_path')}, and local copies stand in for "
                    f"{', '.join(READERS)} only; leave it out, or leave local_data out."
                )
            splits = read_splits(local_data, config["dataset_path"], config.get("dataset_name"))
            used[name] = {split: data.describe() for split, data in splits.items()}
            ours = _local_source(name, config, splits, folder, num_fewshot)
        if name in tasks.runs_code:
            ours = _with_own_functions(name, config, tasks.files[name]) | ours
        elif ours:
            ours = {"include": str(tasks.files[name]), "task": name, **ours}
        if ours:
            write_text(folder / f"{name}.yaml", yaml.dump(ours, Dumper=_Dumper, sort_keys=False))
    return used


def harness_root() -> Path:
    """Return the folder of the harness' task files.

    Raises:
        L0MoEError: the harness is not installed.
    """
    try:
        import lm_eval.tasks
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise L0MoEError(
            "evaluation.benchmarks needs the LM evaluation harness, which is not installed; install the extra "
            "with pip install 'megatron-l0moe[evaluation]', or remove the section."
        ) from error
    return Path(lm_eval.tasks.__file__).parent


def _index(folders: tuple[Path, ...]) -> Mapping[str, Any]:
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of its own files with equal names
    manager = TaskManager(include_defaults=False, include_path=list(folders))
    index: Mapping[str, Any] = manager.task_index
    return index


def _leaves(name: str, index: Mapping[str, Any]) -> set[str]:
    """Return the tasks in a group or tag, at any depth."""
    entry = index[name]
    kind = entry.kind.name
    if kind == "TAG":
        return set(entry.tags)
    if kind != "GROUP":
        return {name}
    found: set[str] = set()
    for member in entry.cfg["task"]:
        inner = member if isinstance(member, str) else member.get("task", member.get("group"))
        if not isinstance(inner, str) or inner not in index:
            raise L0MoEError(
                f"The group {name} of the harness defines {inner!r} inside itself, which is not supported here; name "
                "single tasks in its place."
            )
        found |= _leaves(inner, index)
    return found


def _check_code(runs_code: list[str], configs: Mapping[str, Config], allowed: bool) -> None:
    for name in runs_code:
        if "/humaneval/utils.pass_at_k" not in json.dumps(configs[name], default=str):
            raise L0MoEError(
                f"The task {name} executes what the model writes, and only HumanEval's programs are run in isolation "
                "here; leave it out."
            )
        if not allowed:
            raise L0MoEError(
                f"The task {name} executes what the model writes; set evaluation.benchmarks.allow_code_execution to "
                "true if you want that (in a process without network, other processes and writable files), or leave "
                "the task out."
            )


def _local_source(name: str, config: Config, splits: Splits, folder: Path, num_fewshot: int | None) -> Config:
    """Return the keys that make a task read the splits, written next to it as JSON lines."""
    evaluated = config.get("test_split") or config.get("validation_split")
    if evaluated not in splits:
        raise L0MoEError(
            f"The task {name} evaluates the split {evaluated!r}, which local copies do not have."
        )
    own = config.get("num_fewshot")
    shots = own if own == 0 or num_fewshot is None else num_fewshot  # the harness keeps a 0 of its own
    samples = (config.get("fewshot_config") or {}).get("samples")
    pool = config.get("fewshot_split") or config.get("training_split") or config.get("validation_split")
    if shots and isinstance(samples, list):
        if len(samples) < shots:
            raise L0MoEError(
                f"The task {name} has {len(samples)} few-shot examples of its own and {shots} are asked for; lower "
                "evaluation.benchmarks.num_fewshot."
            )
    elif shots and (pool not in splits or len(splits[pool].documents) < shots):
        raise L0MoEError(
            f"The task {name} needs {shots} few-shot examples from the split {pool!r}, which the local copy beside "
            f"{splits[evaluated].file} does not have; add it, or set evaluation.benchmarks.num_fewshot to 0."
        )
    ours: Config = {
        key: None for key in ("fewshot_split", "training_split") if config.get(key) not in (None, *splits)
    }
    files = {}
    for split, data in splits.items():
        files[split] = str((folder / f"{name}.{split}.jsonl").resolve())
        lines = "".join(json.dumps(document) + "\n" for document in data.documents)
        write_text(Path(files[split]), lines)
    return {
        **ours,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }


class _Function(str):
    """The name of a function, written with the harness' tag for functions."""


class _Dumper(yaml.SafeDumper):
    """Plain YAML, and functions."""


_Dumper.add_representer(
    _Function, lambda dumper, value: dumper.represent_scalar("!function", str(value), style="")
)


def _with_own_functions(name: str, config: Config, file: Path) -> Config:
    """Return a HumanEval task's settings with our functions in place of the harness' ones of the same names."""
    prefix = f"{file.resolve().parent / 'utils'}."  # the harness' loader follows links

    def replace(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replace(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [replace(inner) for inner in value]
        if isinstance(value, str) and value.startswith(prefix):
            function = value.removeprefix(prefix)
            if function not in OWN_FUNCTIONS:
                raise L0MoEError(
                    f"The task {name} uses {function}, which is not supported here; leave it out."
                )
            return _Function(f"megatron_l0moe.evaluation.code_execution.{function}")
        return value

    result: Config = replace(config)
    assert "/humaneval/utils." not in json.dumps(result, default=str), (
        f"{name} would use the harness' functions"
    )
    return result

"""Which tasks of the evaluation harness a recipe names, the task files put over the harness' own, and local data.

A file of ours has the name of the harness' task, so that it takes its place, alone and inside its group, and
`include`s the harness' own file: prompt, few-shot examples, stop sequences, filters and metric stay the harness'
own. It differs in two points only: where the documents come from (local copies), and for HumanEval which
functions run the programs (`code_execution.py`).

A folder of local copies may hold any of these (docs/evaluate.md, "Local copies"):

    gsm8k/test.jsonl              {"question", "answer"}; train.jsonl, or one train_*.jsonl, for few-shot examples
    bbh/SUBTASK.json              {"examples": [{"input", "target"}]}
    humaneval/HumanEval.jsonl.gz  {"task_id", "prompt", "entry_point", "test"}; .jsonl too
    mmlu/test/SUBJECT_test.csv    question, A, B, C, D, letter, no header; dev/SUBJECT_dev.csv for few-shot examples
    mmlu_redux/mmlu_SUBJECT.csv   header with question, choices, answer (0 to 3); "," or ";" between the columns

Nothing is repaired or left out: a file or document of another form stops with its name and what was expected.
"""

import ast
import csv
import gzip
import io
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_l0moe.errors import L0MoEError, nearest
from megatron_l0moe.runs.stage_folder import sha256_file, write_text

logger = logging.getLogger(__name__)

Document = dict[str, object]
LETTERS = "ABCD"


@dataclass(frozen=True, kw_only=True)
class Split:
    """The documents of one file."""

    file: Path
    documents: list[Document]

    def describe(self) -> dict[str, object]:
        """Return what the results say about the data."""
        return {
            "file": str(self.file),
            "sha256": sha256_file(self.file),
            "documents": len(self.documents),
        }


Splits = dict[str, Split]


def read_splits(folder: Path, dataset: str, subset: str | None) -> Splits:
    """Read the local copy of a data set.

    Args:
        folder: the folder of local copies.
        dataset: how the harness' task calls it, a key of READERS.
        subset: a subtask of BBH or a subject of MMLU.

    Returns:
        Documents by split, named as in the data set: `test`, and `train` or `dev` where there are few-shot examples.

    Raises:
        L0MoEError: a file is missing, broken or of another form; one sentence.
    """
    if not folder.is_dir():
        raise L0MoEError(
            f"evaluation.benchmarks.local_data: the folder {folder} does not exist; give the folder of local copies, "
            "see docs/evaluate.md for its layout."
        )
    return READERS[dataset](folder, subset or "")


def _gsm8k(folder: Path, subset: str) -> Splits:
    del subset
    keys = ("question", "answer")
    splits = {"test": _split(_existing(folder / "gsm8k" / "test.jsonl"), _json_lines, keys)}
    train = sorted((folder / "gsm8k").glob("train*.jsonl"))
    if len(train) > 1:
        raise L0MoEError(
            f"{folder / 'gsm8k'} holds {len(train)} files train*.jsonl ({train[0].name}, {train[1].name}); leave the "
            "one that the few-shot examples come from."
        )
    if train:
        splits["train"] = _split(train[0], _json_lines, keys)
    for split in splits.values():
        for number, document in enumerate(split.documents, 1):
            if "#### " not in str(document["answer"]):
                raise L0MoEError(
                    f"{split.file}:{number}: a GSM8K answer ends with '#### NUMBER', and this one does not."
                )
    return splits


def _bbh(folder: Path, subset: str) -> Splits:
    file = _existing(folder / "bbh" / f"{subset}.json")
    return {"test": _split(file, _bbh_examples, ("input", "target"))}


def _humaneval(folder: Path, subset: str) -> Splits:
    del subset
    plain = folder / "humaneval" / "HumanEval.jsonl"
    file = plain if plain.is_file() else _existing(folder / "humaneval" / "HumanEval.jsonl.gz")
    return {"test": _split(file, _json_lines, ("task_id", "prompt", "entry_point", "test"))}


def _mmlu(folder: Path, subset: str) -> Splits:
    original = folder / "mmlu" / "test" / f"{subset}_test.csv"
    if original.is_file() or (folder / "mmlu").is_dir():
        splits = {"test": _questions(_existing(original), _original_rows)}
        dev = folder / "mmlu" / "dev" / f"{subset}_dev.csv"
        if dev.is_file():
            splits["dev"] = _questions(dev, _original_rows)
        return splits
    return {"test": _questions(_existing(folder / "mmlu_redux" / f"mmlu_{subset}.csv"), _redux_rows)}


READERS: dict[str, Callable[[Path, str], Splits]] = {
    "openai/gsm8k": _gsm8k,
    "SaylorTwift/bbh": _bbh,
    "openai/openai_humaneval": _humaneval,
    "cais/mmlu": _mmlu,
}
"""What reads a data set, by its name in the harness' own tasks."""


def _existing(file: Path) -> Path:
    if not file.is_file():
        others = sorted(path.name for path in file.parent.glob("*")) if file.parent.is_dir() else []
        raise L0MoEError(
            f"{file} does not exist{nearest(file.name, others)}; local copies lie in gsm8k/test.jsonl, "
            "bbh/SUBTASK.json, humaneval/HumanEval.jsonl.gz, mmlu/test/SUBJECT_test.csv or mmlu_redux/mmlu_SUBJECT.csv."
        )
    return file


def _split(file: Path, rows: Callable[[Path], Iterator[object]], keys: tuple[str, ...]) -> Split:
    """Read a file whose documents are objects with these keys, all of them text; other keys are left out."""
    documents: list[Document] = []
    for number, row in enumerate(rows(file), 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
            raise L0MoEError(
                f"{file}: document {number} must be an object with the texts {', '.join(keys)}; "
                f"it is {str(row)[:60]!r}."
            )
        documents.append({key: row[key] for key in keys})
    return _filled(file, documents)


def _questions(file: Path, rows: Callable[[str], Iterator[tuple[str, object, object]]]) -> Split:
    """Read multiple-choice questions as cais/mmlu has them: question, four choices, index of the right one."""
    documents: list[Document] = []
    try:
        for question, choices, answer in rows(_text(file)):
            if not isinstance(choices, list) or len(choices) != len(LETTERS) or answer not in (0, 1, 2, 3):
                raise ValueError("it needs four choices and the answer's place among them, 0 to 3 or A to D")
            documents.append(
                {"question": question, "choices": [str(choice) for choice in choices], "answer": answer}
            )
    except (ValueError, SyntaxError, KeyError, csv.Error) as error:
        raise L0MoEError(
            f"{file}: after {len(documents)} questions comes one of another form ({error}); expected are the rows "
            "question, A, B, C, D, letter without a header in mmlu/, or a header with question, choices and answer in "
            "mmlu_redux/."
        ) from error
    return _filled(file, documents)


def _filled(file: Path, documents: list[Document]) -> Split:
    if not documents:
        raise L0MoEError(f"{file} holds no document; copy it again.")
    return Split(file=file, documents=documents)


def _original_rows(text: str) -> Iterator[tuple[str, object, object]]:
    for row in csv.reader(io.StringIO(text, newline="")):
        if len(row) != 6:
            raise ValueError(f"{len(row)} columns")
        yield row[0], row[1:5], LETTERS.index(row[5].strip())


def _redux_rows(text: str) -> Iterator[tuple[str, object, object]]:
    header = text.split("\n", 1)[0]
    separator = max(",;", key=header.count)
    for row in csv.DictReader(io.StringIO(text, newline=""), delimiter=separator):
        yield row["question"], ast.literal_eval(row["choices"]), int(row["answer"])


def _bbh_examples(file: Path) -> Iterator[object]:
    try:
        value = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise L0MoEError(f"{file} is not valid JSON ({error}); copy it again.") from error
    if not isinstance(value, dict) or not isinstance(value.get("examples"), list):
        raise L0MoEError(f"{file} must be an object with a list 'examples', as BIG-Bench Hard publishes it.")
    yield from value["examples"]


def _json_lines(file: Path) -> Iterator[object]:
    for number, line in enumerate(_text(file).split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise L0MoEError(f"{file}:{number} is not valid JSON ({error}); copy it again.") from error


def _text(file: Path) -> str:
    """Return a file's text: UTF-8, or Mac Roman as one published file of MMLU-redux is."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise L0MoEError(f"{file} cannot be read ({error}); copy it again.") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        if file.suffix != ".csv":
            raise L0MoEError(f"{file} is not UTF-8 text; copy it again.") from None
        logger.warning("%s is not UTF-8; it is read as Mac Roman.", file)
        return data.decode("mac_roman")


LOCAL_FOLDERS = ("gsm8k", "bbh", "mmlu", "humaneval")
"""Folders of the harness' tasks with data sets that local copies can stand in for."""
OWN_FUNCTIONS = ("pass_at_k", "build_predictions", "build_predictions_instruct")
"""Functions of the harness' HumanEval that `code_execution.py` has too."""

Config = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """The tasks to run and what they are made of."""

    members: dict[str, list[str]]
    """The tasks in each requested name, itself where it is no group."""
    configs: dict[str, Config]
    """The harness' own settings of each task, functions as text."""
    files: dict[str, Path]
    """The harness' own file of each task."""
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
    """Return the folder of the harness' task files."""
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
            return _Function(f"megatron_l0moe.evaluation.harness.code_execution.{function}")
        return value

    result: Config = replace(config)
    assert "/humaneval/utils." not in json.dumps(result, default=str), (
        f"{name} would use the harness' functions"
    )
    return result

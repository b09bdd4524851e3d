"""Local copies of benchmark data: which files, in which form, and each document as the harness' tasks expect it.

A folder may hold any of these (docs/evaluate.md, "Local copies"):

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_l0moe.errors import L0MoEError, nearest
from megatron_l0moe.runs.stage_folder import sha256_file

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
"""By the data set's name in the harness' own tasks."""


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

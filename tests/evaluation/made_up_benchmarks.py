"""Local copies of benchmarks with a few made-up documents each, in every layout; nothing of the published texts."""

import gzip
import json
from pathlib import Path


def write_local_copies(folder: Path) -> Path:
    write_lines(folder / "gsm8k" / "test.jsonl", [sum_question(7), sum_question(7), sum_question(8)])
    write_lines(folder / "gsm8k" / "train_2.jsonl", [sum_question(1), sum_question(2)])
    examples = [{"input": "pigs fly or birds fly is", "target": target} for target in ("True", "False")]
    write(folder / "bbh" / "boolean_expressions.json", json.dumps({"examples": examples}))
    write(
        folder / "mmlu" / "test" / "anatomy_test.csv",
        "How many arms,0,2,4,8,B\nHow many toes,1,10,2,3,B\nHow many ears,2,1,3,4,A\n",
    )
    write(folder / "mmlu" / "dev" / "anatomy_dev.csv", "How many noses,2,3,1,4,C\n")
    file = folder / "humaneval" / "HumanEval.jsonl.gz"
    file.parent.mkdir(parents=True)
    lines = "".join(json.dumps(problem(number)) + "\n" for number in (7, 8))
    file.write_bytes(gzip.compress(lines.encode()))
    return folder


def sum_question(result: int) -> dict[str, str]:
    return {
        "question": f"I have {result} apples and get none. How many?",
        "answer": f"Still.\n#### {result}",
    }


def problem(number: int) -> dict[str, str]:
    return {
        "task_id": f"Made/{number}",
        "prompt": "def number():\n",
        "entry_point": "number",
        "test": f"def check(candidate):\n    assert candidate() == {number}\n",
        "canonical_solution": f"    return {number}\n",
    }


def write_lines(file: Path, rows: list[object]) -> None:
    write(file, "".join(json.dumps(row) + "\n" for row in rows))


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")

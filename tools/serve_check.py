#!/usr/bin/env python3
"""Serve exported L0-MoEs with vLLM's OpenAI-compatible server and compare its log-probabilities with transformers'.

    python tools/serve_check.py [--model FOLDER] [--out runs/serve_check] [--only-model] [--docs]

Checked are the export of --model (the quickstart's, if it is there), and small random exports, one for each layout
that vLLM is given. A fault on purpose must be found out: a router whose rows belong to other experts. What vLLM makes
of the Qwen2-MoE layout without biases, which it never sets, is shown. SGLang needs a GPU to run: exports for it are
held against its loading rules instead. Needs the environment of scripts/setup_serve.sh. Exit code 1: something is not
as it must be.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import random_export
from serve_table import Case, Reference, Row, compare, markdown, sglang_markdown, unserved, write_docs
from sglang_rules import sglang_problems
from vllm_server import Completion, ServerError, complete, serve

from megatron_l0moe.checkpoints.safetensors_files import SafetensorsFolder
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.evaluation.bench.vllm_runner import SERVE_PYTHON, worker_environment
from megatron_l0moe.runs.stage_folder import write_json, write_text

PROMPT = "The mixture of experts answers one question after the other, and each of them"
NEW_TOKENS = 24
QUICKSTART = Path("runs/quickstart/export")
OLD_TRANSFORMERS = SERVE_PYTHON.parents[1] / "transformers-4.57"
DOCS = Path("docs/serving.md")
TOOLS = Path(__file__).parent


def main(words: Sequence[str] | None = None) -> int:
    """Run the check; returns the exit code."""
    arguments = _parse(words)
    if not SERVE_PYTHON.is_file():
        raise L0MoEError(f"{SERVE_PYTHON} does not exist; run `make serve-check`, which makes it.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="l0moe-serve-") as scratch:
        cases = make_cases(arguments.model, Path(scratch), only_model=arguments.only_model)
        rows = check(cases, arguments.out)
        rules = sglang_rows(cases, Path(scratch))
    table = "\n".join([*markdown(rows), "", *sglang_markdown(rules)])
    write_json(arguments.out / "serve_check.json", {"rows": [row.to_json() for row in rows], "sglang": rules})
    write_text(arguments.out / "serve_check.md", table + "\n")
    if arguments.docs:
        write_docs(DOCS, table)
    print(table)
    failed = [f"{row.model} in {row.engine}: {row.verdict}" for row in rows if not row.passed]
    failed += [f"{name} in SGLang: {problems[0]}" for name, problems in rules.items() if problems]
    for line in failed:
        print(f"Not as it must be: {line}", file=sys.stderr)
    return 1 if failed else 0


def make_cases(model: Path | None, scratch: Path, *, only_model: bool) -> list[Case]:
    """Return what is to be served; random exports are made in `scratch`."""
    cases = []
    model = model or (QUICKSTART if (QUICKSTART / "config.json").is_file() else None)
    if model is not None:
        if not (model / "config.json").is_file():
            raise L0MoEError(f"{model} holds no config.json; give the folder of an export.")
        cases.append(Case(name=model.parent.name if model.name == "export" else model.name, folder=model))
    if model is None or not only_model:
        shapes = {
            "random Llama": random_export.small_shape("llama-3-8b"),
            "random Llama, gate weights softmax's own": random_export.small_shape(
                "llama-3-8b", renormalised=False
            ),
            "random Qwen2": random_export.small_shape("qwen2-7b"),
        }
        for i, (name, shape) in enumerate(shapes.items()):
            cases.append(Case(name=name, folder=random_export.random_export(shape, scratch / f"{i}", "vllm")))
    first = cases[0]
    rolled = random_export.with_rolled_router(first.folder, scratch / "rolled")
    cases.append(
        Case(
            name=f"{first.name}, rows of a router moved",
            folder=rolled,
            expected="fault",
            reference=first.folder,
        )
    )
    for case in cases[1:]:
        if case.layout == "qwen2_moe" and "Llama" in case.name:
            bare = random_export.without_qkv_bias(case.folder, scratch / "bare")
            cases.append(
                Case(name=f"{case.name}, no biases", folder=bare, expected="unset", reference=case.folder)
            )
            break
    return cases


def check(cases: Sequence[Case], logs: Path) -> list[Row]:
    """Serve every case, then ask every transformers for the same tokens, and compare."""
    answers: list[Completion | ServerError] = []
    for i, case in enumerate(cases):
        print(f"serving {case.name}", file=sys.stderr, flush=True)
        answers.append(_serve_one(case, logs / f"vllm_{i}.log"))
    requests = [
        {
            "model": str((case.reference or case.folder).absolute()),
            "tokens": [*answer.prompt, *answer.generated],
        }
        for case, answer in zip(cases, answers, strict=True)
        if isinstance(answer, Completion)
    ]
    environments = transformers_environments()
    found = [ask_transformers(python, extra, requests) for python, extra in environments]
    engine = f"vLLM {vllm_version()}, server"
    rows = []
    place = 0
    for case, answer in zip(cases, answers, strict=True):
        if isinstance(answer, ServerError):
            print(f"  {answer}", file=sys.stderr, flush=True)
            rows.append(unserved(case, engine))
            continue
        rows += compare(case, answer, [references[place] for references in found], engine)
        place += 1
    return rows


def transformers_environments() -> list[tuple[Path, Path | None]]:
    """Return (Python, folder that goes before its packages): training, serving, serving with transformers 4.57."""
    found: list[tuple[Path, Path | None]] = [(Path(sys.executable), None), (SERVE_PYTHON.absolute(), None)]
    if OLD_TRANSFORMERS.is_dir():
        found.append((SERVE_PYTHON.absolute(), OLD_TRANSFORMERS.absolute()))
    return found


def ask_transformers(
    python: Path, extra: Path | None, requests: Sequence[dict[str, object]]
) -> list[Reference]:
    """Run transformers_logprobs.py in an environment."""
    environment = worker_environment(1) | ({"PYTHONPATH": str(extra)} if extra else {})
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(requests, file)
        file.flush()
        done = subprocess.run(
            [str(python), str(TOOLS / "transformers_logprobs.py"), file.name],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
    if done.returncode:
        raise L0MoEError(
            f"transformers failed in {python}: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
        )
    answer = json.loads(done.stdout.splitlines()[-1])
    return [Reference(version=answer["version"], **result) for result in answer["results"]]


def sglang_rows(cases: Sequence[Case], scratch: Path) -> dict[str, list[str]]:
    """Hold every Ernie4.5-MoE export, and one of a Qwen2 for SGLang, against SGLang's loading rules."""
    folders = {
        case.name: case.folder for case in cases if case.layout == "ernie4_5_moe" and not case.reference
    }
    if any("Qwen2" in case.name for case in cases):
        shape = random_export.small_shape("qwen2-7b")
        folders["random Qwen2, for SGLang"] = random_export.random_export(shape, scratch / "sglang", "sglang")
    return {name: sglang_problems(*config_and_shapes(folder)) for name, folder in folders.items()}


def vllm_version() -> str:
    """Return the version in the serving environment."""
    for info in SERVE_PYTHON.parents[1].glob("lib/python*/site-packages/vllm*.dist-info"):
        return info.name.removesuffix(".dist-info").split("-")[1]
    return "of unknown version"


def _serve_one(case: Case, log: Path) -> Completion | ServerError:
    try:
        with serve(case.folder, python=SERVE_PYTHON, log=log) as address:
            answer = complete(address, PROMPT, NEW_TOKENS)
    except ServerError as error:
        if case.expected == "equal":
            raise
        return error
    print(f"  {answer.text!r}", file=sys.stderr, flush=True)
    return answer


def config_and_shapes(folder: Path) -> tuple[dict[str, object], dict[str, tuple[int, ...]]]:
    """Return config.json and the shapes of all tensors of a checkpoint."""
    tensors = SafetensorsFolder(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config, {name: tensors.shape(name) for name in tensors.names}


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--model", type=Path, help="exported L0-MoE; left out: the quickstart's, if it is there"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/serve_check"), help="for table and vLLM's logs"
    )
    parser.add_argument("--only-model", action="store_true", help="serve no random models beside it")
    parser.add_argument("--docs", action="store_true", help=f"also write the table into {DOCS}")
    return parser.parse_args(words)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Ended from outside, the servers, which are process groups of their own, must end too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        sys.exit(main())
    except L0MoEError as problem:
        sys.exit(str(problem))

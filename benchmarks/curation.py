"""What curation costs: tokenising, k-means, the order of the sets, and how time and memory grow with the corpus.

    python benchmarks/curation.py --corpus FOLDER [--preprocess-data FILE] [--only tokenise] [--json FILE]

Every subject runs in a process of its own. Sides that are compared run in turns, and in another order each time; each
turn gives one ratio. Tokenising counts the processor time of the whole process and its children, less that of a run
over one document: start-up is not what a large corpus costs. Documents that quote a special token are left out, since
the tools differ there by intention; all others must be the same bytes. `--preprocess-data` is Megatron-LM's
tools/preprocess_data.py (branch core_r0.19.0), which its wheel does not hold; without it that side is left out.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_l0moe.runtime.hardware import describe_machine

WORKERS = Path(__file__).with_name("curation_workers.py")
TOKENISE_GOAL, KMEANS_GOAL, KMEANS_GOAL_MB, CCM_GOAL_SECONDS = 2.0, 1.2, 4000, 1.0
PREPROCESS = (
    "import runpy, sys; from megatron_l0moe.runtime import cpu; cpu.install_training(); sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)
"""Its imports need CUDA where our runtime is not installed."""


def main() -> None:
    """Measure, print a line for each result, write JSON."""
    options = _options()
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": describe_machine(device="cpu", threads=1),
        "faiss_datatrove_tokenizers": [_version(name) for name in ("faiss-cpu", "datatrove", "tokenizers")],
        "results": [],
    }
    print(json.dumps(report, indent=2))
    subjects = {"tokenise": tokenise, "kmeans": kmeans, "ccm": ccm, "scale": scale}
    for name, subject in subjects.items():
        if options.only in (None, name):
            with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
                for result in subject(options, Path(folder)):
                    report["results"].append(result)
                    print(line(result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def tokenise(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Compare tokens per CPU-second on the same text, and the documents that are written."""
    model = with_eod(options.model, options.eod, folder / "model")
    texts = {"whole": folder / "whole.jsonl", "start": folder / "start.jsonl"}
    text = {"corpus": options.corpus, "model": str(options.model), "characters": options.characters}
    size = worker("make_text", out=str(texts["whole"]), **text)
    with texts["whole"].open(encoding="utf-8") as file:
        texts["start"].write_text(file.readline(), encoding="utf-8")
    sides = ["ours", "datatrove"] + (["preprocess_data"] if options.preprocess_data else [])
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    gross: dict[str, list[float]] = {side: [] for side in sides}
    written: dict[str, Path] = {}
    tokens = 0
    for turn in range(options.repeats):
        for side in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
            spent = {}
            for part, text in texts.items():
                out = folder / f"{side}_{part}"
                command, made = tokenise_command(side, text, model, out, options)
                spent[part], numbers = run(command)
                if part == "whole":
                    written[side] = made
                    tokens = numbers.get("tokens", tokens)
            seconds[side].append(spent["whole"] - spent["start"])
            gross[side].append(spent["whole"])
    ours = written["ours"].read_bytes()
    results = []
    for side in sides:
        rates = [tokens / spent for spent in seconds[side]]
        results.append(
            {
                "name": f"tokenise, {side}",
                "tokens": tokens,
                **size,
                "tokens_per_cpu_second": spread(rates),
                "with_start_up": spread([tokens / spent for spent in gross[side]]),
                "ours_is_times_faster": spread(
                    [a / b for a, b in zip(seconds[side], seconds["ours"], strict=True)]
                ),
                "goal": TOKENISE_GOAL if side == "preprocess_data" else None,
                "same_bytes_as_ours": written[side].read_bytes() == ours,
            }
        )
    return results


def tokenise_command(
    side: str, text: Path, model: Path, out: Path, options: argparse.Namespace
) -> tuple[list[str], Path]:
    """Return the command of a side, and the .bin that it writes."""
    out.mkdir(exist_ok=True)
    if side == "ours":
        values = {"text": str(text), "model": str(model), "out": str(out / "all")}
        return worker_command("tokenise_ours", **values), out / "all.bin"
    if side == "datatrove":
        values = {"text": str(text), "model": str(model), "out": str(out), "eod_token": options.eod}
        return worker_command("tokenise_datatrove", **values), out / "all_00000_tokens.bin"
    flags = ["--input", text, "--output-prefix", out / "all", "--append-eod", "--workers", "1"]
    flags += [
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        model,
        "--log-interval",
        "1000000",
    ]
    command = [sys.executable, "-c", PREPROCESS, options.preprocess_data, *flags]
    return [str(word) for word in command], out / "all_text_document.bin"


def with_eod(model: Path, eod: str, folder: Path) -> Path:
    """Copy a model's tokenizer with `eod` as the token that ends a document, which some tools take from there only."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(model / name, folder / name)
    file = model / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config, "eos_token": eod}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def kmeans(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Compare our clustering of a file of vectors with faiss' own on the same training points."""
    file = str(folder / "vectors.npy")
    worker("make_vectors", file=file, count=options.vectors, dimension=options.dimension)
    sides: dict[str, list[dict[str, Any]]] = {"kmeans_ours": [], "kmeans_bare": []}
    for turn in range(options.repeats):
        for side in sorted(sides, reverse=turn % 2 == 0):
            sides[side].append(worker(side, file=file, clusters=options.clusters))
    ours, bare = sides.values()
    pairs = list(zip(ours, bare, strict=True))
    return [
        {
            "name": "k-means and assignment",
            "vectors": options.vectors,
            "dimension": options.dimension,
            "clusters": options.clusters,
            "points": bare[0]["points"],
            "time_ratio": spread([a["seconds"] / b["seconds"] for a, b in pairs]),
            "cpu_ratio": spread([a["cpu_seconds"] / b["cpu_seconds"] for a, b in pairs]),
            "goal": KMEANS_GOAL,
            "cpu_seconds": [spread([side["cpu_seconds"] for side in part]) for part in (ours, bare)],
            "peak_mb": [max(side["peak_mb"] for side in part) for part in (ours, bare)],
            "goal_mb": KMEANS_GOAL_MB,
            "objective": [ours[0]["objective"], bare[0]["objective"]],
        }
    ]


def ccm(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Time the order of the sets."""
    sizes = {"clusters": options.clusters, "iterations": options.iterations, "dimension": options.dimension}
    seconds = [worker("ccm", **sizes)["seconds"] for _ in range(options.repeats)]
    return [{"name": "CCM and order", **sizes, "seconds": spread(seconds), "goal_seconds": CCM_GOAL_SECONDS}]


def scale(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Let n grow; the training points of k-means and the length of vectors are kept small."""
    results = []
    for times in options.growth:
        count, file = options.scale_vectors * times, str(folder / "vectors.npy")
        worker("make_vectors", file=file, count=count, dimension=options.scale_dimension)
        sizes = {"clusters": options.clusters, "points": options.scale_points}
        results.append(
            grown("k-means and assignment, vectors", count, worker("kmeans_ours", file=file, **sizes))
        )
    for times in options.growth:
        text, out = folder / f"{times}.jsonl", folder / f"{times}"
        made = {"corpus": options.corpus, "model": str(options.model)}
        characters = options.characters * times // max(options.growth)
        size = worker("make_text", out=str(text), characters=characters, **made)
        numbers = worker("tokenise_ours", text=str(text), model=str(options.model), out=str(out))
        results.append(grown("tokenising, characters", size["characters"], numbers))
    for times in options.growth:
        numbers = worker("index", folder=str(folder / f"index{times}"), samples=options.scale_samples * times)
        results.append(grown("index, samples", options.scale_samples * times, numbers))
    return results


def grown(name: str, count: int, numbers: dict[str, Any]) -> dict[str, Any]:
    """Return one row of the growth table."""
    return {
        "name": f"growth of {name}",
        "n": count,
        "cpu_seconds": numbers["cpu_seconds"],
        "peak_mb": numbers["peak_mb"],
        "above_start_mb": numbers["peak_mb"] - numbers["base_mb"],
    }


def worker_command(name: str, **values: Any) -> list[str]:
    """Return the command of a function of curation_workers.py."""
    return [sys.executable, str(WORKERS), name, json.dumps(values)]


def worker(name: str, **values: Any) -> dict[str, Any]:
    """Run a function of curation_workers.py in a process of its own; returns its numbers."""
    return run(worker_command(name, **values))[1]


def run(command: list[str]) -> tuple[float, dict[str, Any]]:
    """Return the CPU-seconds of a process and its children, and what its last line of JSON says."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), errors.seek(0)
        if process.returncode:
            raise SystemExit(
                f"{shlex.join(command)} failed:\n{errors.read().decode(errors='replace')[-3000:]}"
            )
        last = out.read().decode().strip().rpartition("\n")[2]
    return usage.ru_utime + usage.ru_stime, json.loads(last) if last.startswith("{") else {}


def spread(values: list[float]) -> dict[str, float]:
    """Return median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def line(result: dict[str, Any]) -> str:
    """Return a result as text."""
    return "\n".join(
        [result["name"], *(f"    {key}: {_words(value)}" for key, value in result.items() if key != "name")]
    )


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return f"{_words(value['median'])} ({_words(value['min'])} to {_words(value['max'])})"
    if isinstance(value, list):
        return " | ".join(_words(item) for item in value)
    return (
        f"{value:,.4g}"
        if isinstance(value, float) and abs(value) < 1e4
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("tokenise", "kmeans", "ccm", "scale"), help="one part; else all")
    parser.add_argument("--corpus", help="corpus to take text from, as data.corpus of a recipe")
    parser.add_argument(
        "--model", type=Path, default=Path("models/smollm2-135m-instruct"), help="tokenizer's folder"
    )
    parser.add_argument("--eod", default="<|endoftext|>", help="token that ends a document")
    parser.add_argument("--preprocess-data", type=Path, help="Megatron-LM's tools/preprocess_data.py")
    parser.add_argument("--characters", type=int, default=20_000_000, help="text that is tokenised")
    parser.add_argument("--vectors", type=int, default=500_000, help="of k-means")
    parser.add_argument("--dimension", type=int, default=1024, help="of the vectors")
    parser.add_argument("--clusters", type=int, default=64, help="K")
    parser.add_argument("--iterations", type=int, default=21, help="Q")
    parser.add_argument("--growth", type=int, nargs="+", default=[1, 10, 100], help="times that n grows")
    parser.add_argument("--scale-vectors", type=int, default=20_000, help="vectors at 1x")
    parser.add_argument("--scale-dimension", type=int, default=128, help="of the vectors that grow in number")
    parser.add_argument("--scale-points", type=int, default=256, help="training points a cluster there")
    parser.add_argument("--scale-samples", type=int, default=72_000, help="samples of the index at 1x")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each comparison")
    parser.add_argument("--scratch", type=Path, help="folder for temporary files, 1 GB for 500,000 vectors")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    if options.corpus is None and options.only in (None, "tokenise", "scale"):
        parser.error("--corpus is needed to tokenise")
    return options


if __name__ == "__main__":
    main()

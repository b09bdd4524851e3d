"""Kill curate at random moments of each of its steps, run it again, and compare every file with an undisturbed run.

    python benchmarks/curate_kills.py RECIPE --kills 20 --out /tmp/kills

Every run is a fork of this process, which has imported everything, so that a run takes seconds. The units of work are
made small, so that each step has several. A kill is SIGKILL, at a moment drawn evenly from the step's time in the
undisturbed run. Some runs are killed twice: the second time in the run that should have repaired the first.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import FlagEmbedding  # noqa: F401 - imported before the forks

from megatron_l0moe.curate import curate as curate_module
from megatron_l0moe.curate import steps
from megatron_l0moe.index import tokens  # noqa: F401
from megatron_l0moe.recipe.recipe import Recipe, load_recipe

STEPS = ("scan", "hold out", "embed", "cluster", "tokenise", "index")


def main() -> int:
    """Print one JSON line for each step; the exit code says whether all results were equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs; emptied")
    parser.add_argument("--kills", type=int, default=20, help="of each step")
    parser.add_argument("--steps", nargs="+", default=STEPS, choices=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scan-bytes", type=float, default=1e5)
    parser.add_argument("--embed-documents", type=int, default=64)
    parser.add_argument("--tokenise-tokens", type=float, default=2e4)
    options = parser.parse_args()
    steps.SCAN_BYTES, steps.EMBED_DOCUMENTS = options.scan_bytes, options.embed_documents
    steps.TOKENISE_TOKENS = options.tokenise_tokens
    recipe = load_recipe(options.recipe)
    shutil.rmtree(options.out, ignore_errors=True)

    whole = options.out / "whole"
    assert run(recipe, whole) == 0, "the undisturbed run failed"
    seconds = json.loads((whole / "summary.json").read_text())["seconds"]
    expected = checksums(whole)
    units = {
        step: len(list((whole / "work" / step).rglob("[0-9]*.npy"))) for step in ("scan", "embed", "tokenise")
    }
    print(json.dumps({"files": len(expected), "seconds": seconds, "units": units}), flush=True)

    equal = True
    for step in options.steps:
        draw = random.Random(f"{options.seed} {step}")  # noqa: S311
        counts = {"killed": 0, "killed twice": 0, "ended before": 0, "different": 0, "units kept": 0}
        while counts["killed"] < options.kills:
            out = options.out / "killed"
            shutil.rmtree(out, ignore_errors=True)
            if run(recipe, out, kill=(step, draw.uniform(0, seconds[step]))) == 0:
                counts["ended before"] += 1
                continue
            counts["killed"] += 1
            if draw.random() < 0.3:
                again = run(recipe, out, kill=(step, draw.uniform(0, seconds[step])))
                counts["killed twice"] += again != 0
            counts["units kept"] += len(list((out / "work").rglob("[0-9]*.json")))
            assert run(recipe, out) == 0, f"the run after the kill failed, see {out}.log"
            counts["different"] += checksums(out) != expected
        equal &= not counts["different"]
        print(json.dumps({"step": step, **counts}), flush=True)
    return 0 if equal else 1


def run(recipe: Recipe, out: Path, kill: tuple[str, float] | None = None) -> int:
    """Run curate in a fork, killed so many seconds after the start of a step; returns 0 if it ended well."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 2)
            if kill:
                arm(*kill)
            curate_module.curate(recipe, out)
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def arm(step: str, delay: float) -> None:
    """Kill this process so long after the step begins."""
    timed = curate_module.StepClock.step

    @contextlib.contextmanager
    def stepped(clock: curate_module.StepClock, name: str) -> Iterator[None]:
        with timed(clock, name):
            if name == step:
                threading.Thread(target=_die, args=(time.monotonic() + delay,), daemon=True).start()
            yield

    curate_module.StepClock.step = stepped  # type: ignore[method-assign]


def _die(moment: float) -> None:
    time.sleep(max(moment - time.monotonic(), 0))
    os.kill(os.getpid(), signal.SIGKILL)


def checksums(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of the result but summary.json, which holds seconds."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "summary.json" and folder / "work" not in path.parents
    }


if __name__ == "__main__":
    sys.exit(main())

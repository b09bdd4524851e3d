"""Kill the toy chain at random moments until it has been killed often enough, and compare what it measures in the end.

    python benchmarks/chain_kills.py FOLDER [--kills 20] [--seed 1]

The chain of the tests (tests/whole_chain/toy_world.py) runs once undisturbed. Then `l0moe run` is killed with SIGKILL
after a random time and started again, until it ends; what its summary holds beside times must be what the undisturbed
run's holds. A chain that ends before there were enough kills is begun anew. Exit code 1 if one differs or fails.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from whole_chain import toy_world as toy

from megatron_l0moe.reports.summary import deterministic_part

SHORTEST, LONGEST = 0.04, 0.4
"""Of an undisturbed run's time: between the start of a command and its kill."""


def main() -> int:
    """Run, kill, compare, and print where each kill fell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    recipe = toy.make_world(options.folder / "world")
    started = time.monotonic()
    expected = _summary_of(recipe, options.folder / "undisturbed")
    whole = time.monotonic() - started
    print(f"undisturbed: {whole:.0f} s", flush=True)
    rng = random.Random(options.seed)  # noqa: S311 - when to kill
    kills = different = 0
    while kills < options.kills:
        runs = options.folder / "killed"
        shutil.rmtree(runs, ignore_errors=True)
        while kills < options.kills and _is_killed(recipe, runs, rng.uniform(SHORTEST, LONGEST) * whole):
            kills += 1
            done = sorted(marker.parent.name for marker in runs.rglob("DONE"))
            print(f"kill {kills}, done before it: {', '.join(done) or 'nothing'}", flush=True)
        is_equal = _summary_of(recipe, runs) == expected
        different += not is_equal
        print(f"the chain's end: {'equal' if is_equal else 'DIFFERENT'}", flush=True)
    return int(different > 0)


def _is_killed(recipe: Path, runs: Path, seconds: float) -> bool:
    """Start the chain and kill it after a time; False if it ended before."""
    command = toy.command(recipe, runs)
    silent = subprocess.DEVNULL
    with subprocess.Popen(
        command, env=toy.environment(), stdout=silent, stderr=silent, start_new_session=True
    ) as run:
        try:
            run.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.kill(run.pid, signal.SIGKILL)
            return True
    return False


def _summary_of(recipe: Path, runs: Path) -> dict[str, Any]:
    """Run the chain to its end, which does nothing where it is done, and return its summary without times."""
    done = toy.run(recipe, runs)
    if done.returncode:
        sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
    summary = json.loads((runs / "toy" / "summary.json").read_text(encoding="utf-8"))
    return deterministic_part(summary)


if __name__ == "__main__":
    sys.exit(main())

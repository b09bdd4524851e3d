"""Stands in for `python -m megatron_l0moe STAGE RECIPE --runs-dir DIR`: each stage writes one small file.

FAKE_FAIL=stage raises there, FAKE_REFUSE=stage ends with a sentence for the user, FAKE_HANG=stage waits,
FAKE_MEET=stage waits until two folders of the stage are worked on.
"""

import os
import sys
import time
from pathlib import Path

from megatron_l0moe.chain.run_local import carry_out
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.recipe import load_recipe
from megatron_l0moe.runs.stage_folder import StageFolder
from megatron_l0moe.runs.stages import Run


def meet(run: Run, stage: StageFolder) -> None:
    """Wait until two stages have been here, and note how many were at the same time."""
    folder = run.folder / "meeting"
    folder.mkdir(exist_ok=True)
    (folder / stage.folder.name).write_text("here")
    deadline = time.monotonic() + 20
    while len(list(folder.iterdir())) < 2:
        if time.monotonic() > deadline:
            raise RuntimeError("nobody came")
        time.sleep(0.02)


def main() -> None:
    """Do one stage."""
    name, recipe, runs_dir = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[4])
    only = int(sys.argv[6]) if sys.argv[5:6] == ["--index"] else None
    run = Run(recipe=load_recipe(recipe), recipe_file=recipe, runs_dir=runs_dir)
    with (runs_dir / "calls").open("a") as calls:
        calls.write(f"{name}\n")

    def work(stage: StageFolder) -> dict[str, object]:
        (stage.folder / "half").write_text("half")
        if os.environ.get("FAKE_FAIL") == name:
            raise RuntimeError("the disk is on fire")
        if os.environ.get("FAKE_REFUSE") == name:
            raise L0MoEError("The corpus is empty; add shards.")
        if os.environ.get("FAKE_MEET") == name:
            meet(run, stage)
        if os.environ.get("FAKE_HANG") == name:
            (run.folder / "hanging").write_text(f"{os.getpid()}")
            time.sleep(100)
        (stage.folder / "out").write_text(name)
        return {"fake": True}

    try:
        carry_out(run, name, work, only=only)
    except L0MoEError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

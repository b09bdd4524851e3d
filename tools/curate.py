"""Make training sets from a corpus without the recipe chain: python tools/curate.py RECIPE --out DIR.

Does what `l0moe curate RECIPE` does, into any folder; run it again to go on after an interruption.
"""

import argparse
import logging
import shutil
import sys
from pathlib import Path

from megatron_l0moe.curate.curate import curate
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.recipe import load_recipe
from megatron_l0moe.runs.stage_folder import WORK


def main() -> int:
    """Run the stage; the exit code is 2 for a problem that the user can solve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of the result")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s | %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("megatron_l0moe").setLevel(logging.INFO)
    try:
        curate(load_recipe(options.recipe), options.out)
    except L0MoEError as error:
        print(error, file=sys.stderr)
        return 2
    shutil.rmtree(options.out / WORK)
    return 0


if __name__ == "__main__":
    sys.exit(main())

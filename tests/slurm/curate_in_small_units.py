"""Program: the stage curate of a recipe, with a small corpus cut into several units. Arguments: recipe, folder."""

import logging
import sys
from pathlib import Path

from megatron_l0moe.curate import sampling, steps
from megatron_l0moe.curate.curate import curate
from megatron_l0moe.curate.tasks import run
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.recipe import load_recipe

if __name__ == "__main__":
    steps.SCAN_BYTES, steps.EMBED_DOCUMENTS, steps.TOKENISE_TOKENS = 40e3, 30, 500.0
    sampling.TOKENISE_MARGIN = 2.0  # one round of tokenising
    run.POLL_SECONDS = 1.0
    logging.basicConfig(level="INFO")
    try:
        curate(load_recipe(sys.argv[1]), Path(sys.argv[2]))
    except L0MoEError as error:
        sys.exit(str(error))

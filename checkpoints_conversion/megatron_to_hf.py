"""Export a Megatron checkpoint, dense, L0-MoE, DSMoE or Mixture-of-Masks, as a Hugging Face checkpoint.

Example: python checkpoints_conversion/megatron_to_hf.py runs/quickstart/moe/checkpoints \
    --base models/smollm2-135m-instruct --out exported --dense-layers 6 --top-k 2 --target all
"""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import get_args

from megatron_l0moe.checkpoints.torch_dist import CheckpointReader
from megatron_l0moe.conversion.export import export_dense, export_dsmoe, export_moe, export_mom
from megatron_l0moe.conversion.model_card import CardFacts, recipe_facts, summary_facts
from megatron_l0moe.conversion.targets import Target
from megatron_l0moe.errors import L0MoEError, sentence_of
from megatron_l0moe.recipe.recipe import load_recipe


def main() -> int:
    """Return the exit code: 0, or 2 for a problem that the user can fix."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with latest_checkpointed_iteration.txt")
    parser.add_argument(
        "--base", type=Path, required=True, help="the dense Hugging Face checkpoint of the run"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the new checkpoint")
    parser.add_argument(
        "--dense-layers",
        type=int,
        help="bottom dense layers of an L0-MoE; absent: any other model",
    )
    parser.add_argument("--top-k", type=int, default=2, help="experts that serve one token")
    parser.add_argument(
        "--target", choices=get_args(Target), default="all", help="the engines that an L0-MoE is for"
    )
    parser.add_argument("--recipe", type=Path, help="the run's recipe, for the model card")
    parser.add_argument("--summary", type=Path, help="the run's summary.json, which holds the recipe too")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        stage = CheckpointReader(arguments.source).settings.get("stage")
        if stage == "mom":
            result = export_mom(arguments.source, arguments.base, arguments.out, card=_facts(arguments))
        elif stage == "dsmoe":
            result = export_dsmoe(arguments.source, arguments.base, arguments.out, card=_facts(arguments))
        elif arguments.dense_layers is None:
            result = export_dense(arguments.source, arguments.base, arguments.out)
        else:
            result = export_moe(
                arguments.source,
                arguments.base,
                arguments.out,
                dense_layers=arguments.dense_layers,
                top_k=arguments.top_k,
                target=arguments.target,
                card=_facts(arguments),
            )
    except (L0MoEError, OSError) as error:
        sys.stderr.write(f"{sentence_of(error, arguments.out)}\n")
        return 2
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return 0


def _facts(arguments: argparse.Namespace) -> CardFacts:
    if arguments.summary is not None:
        return summary_facts(arguments.summary)
    return CardFacts() if arguments.recipe is None else recipe_facts(load_recipe(arguments.recipe))


if __name__ == "__main__":
    sys.exit(main())

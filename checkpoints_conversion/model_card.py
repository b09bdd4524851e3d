"""Write the model card (README.md) of an exported L0-MoE anew, with the numbers that its run measured.

Example: python checkpoints_conversion/model_card.py runs/quickstart/export \
    --base models/smollm2-135m-instruct --summary runs/quickstart/summary.json
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from megatron_l0moe.conversion.model_card import rewrite_card, summary_facts
from megatron_l0moe.errors import L0MoEError, sentence_of


def main() -> int:
    """Return the exit code: 0, or 2 for a problem that the user can fix."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("export", type=Path, help="folder of the exported L0-MoE")
    parser.add_argument(
        "--base", type=Path, required=True, help="the dense checkpoint that the run began with"
    )
    parser.add_argument("--base-name", help="what the card calls it; default: the folder's name")
    parser.add_argument("--summary", type=Path, required=True, help="the run's summary.json")
    arguments = parser.parse_args()
    try:
        facts = dataclasses.replace(summary_facts(arguments.summary), base_name=arguments.base_name)
        rewrite_card(arguments.export, arguments.base, facts)
    except (L0MoEError, OSError) as error:
        sys.stderr.write(f"{sentence_of(error, arguments.export)}\n")
        return 2
    sys.stdout.write(f"wrote {arguments.export / 'README.md'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

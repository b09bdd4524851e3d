"""Export a Megatron checkpoint, dense or L0-MoE, as a Hugging Face checkpoint.

Example: python checkpoints_conversion/megatron_to_hf.py runs/quickstart/moe/checkpoints \
    --base models/smollm2-135m-instruct --out exported --dense-layers 6 --top-k 2
"""

import argparse
import json
import logging
import sys
from pathlib import Path

from megatron_l0moe.conversion.export import export_dense, export_moe
from megatron_l0moe.errors import L0MoEError


def main() -> int:
    """Return the exit code: 0, or 2 for a problem that the user can fix."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with latest_checkpointed_iteration.txt")
    parser.add_argument(
        "--base", type=Path, required=True, help="the dense Hugging Face checkpoint of the run"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the new checkpoint")
    parser.add_argument(
        "--dense-layers", type=int, help="bottom dense layers of an L0-MoE; absent: a dense model"
    )
    parser.add_argument("--top-k", type=int, default=2, help="experts that serve one token")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if arguments.dense_layers is None:
            result = export_dense(arguments.source, arguments.base, arguments.out)
        else:
            result = export_moe(
                arguments.source,
                arguments.base,
                arguments.out,
                dense_layers=arguments.dense_layers,
                top_k=arguments.top_k,
            )
    except L0MoEError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

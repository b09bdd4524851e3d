"""Convert a dense Hugging Face checkpoint, an exported L0-MoE or a GGUF file to a Megatron checkpoint.

Example: python checkpoints_conversion/hf_to_megatron.py models/smollm2-135m-instruct --out converted
"""

import argparse
import json
import logging
import sys
from pathlib import Path

from megatron_l0moe.conversion.convert import convert_any
from megatron_l0moe.errors import L0MoEError, sentence_of


def main() -> int:
    """Return the exit code: 0, or 2 for a problem that the user can fix."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="Hugging Face checkpoint folder, or a .gguf file")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="writes OUT/megatron (from a .gguf: a Hugging Face checkpoint)",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if arguments.source.suffix == ".gguf":
            from megatron_l0moe.conversion.gguf import gguf_to_hf  # imports the libraries of tokenizers

            result = gguf_to_hf(arguments.source, arguments.out)
        else:
            result = convert_any(arguments.source, arguments.out)
    except (L0MoEError, OSError) as error:
        sys.stderr.write(f"{sentence_of(error, arguments.out)}\n")
        return 2
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

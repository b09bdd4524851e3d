#!/usr/bin/env python3
"""The reproduction in small, one command: steps corpus, tokenizer, tokens, base, methods, tables; see README.md.

    python benchmarks/reproduction/run.py --corpus FOLDER [--out runs/reproduction] [STEP ...]

Without a step, all of them. What is done is not done again; a step that was stopped goes on.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import base_step
import corpus_step
import tokenizer_step
from settings import Place, load_settings

from megatron_l0moe.data.manifest import Restart, Stage, begin, finish, is_done
from megatron_l0moe.errors import L0MoEError

HERE = Path(__file__).parent
logger = logging.getLogger(__name__)


def do(stage: Stage, restart: Restart, work: Callable[[Path], dict[str, object]]) -> None:
    """Do a step if it is not done yet: work, manifest, marker."""
    if is_done(stage):
        logger.info("%s: done", stage.name)
        return
    begin(stage, restart)
    logger.info("%s ...", stage.name)
    finish(stage, sys.argv, work(stage.folder))


def corpus(place: Place) -> None:
    """Split the corpus."""
    settings = place.settings.corpus
    do(place.corpus(), "clear", lambda out: corpus_step.split_corpus(place.source, out, settings))


def tokenizer(place: Place) -> None:
    """Train the tokenizer and write the model's config."""
    settings, train = place.settings, place.root / "corpus" / "train"
    do(
        place.tokenizer(),
        "clear",
        lambda out: tokenizer_step.make_model_folder(
            train, out, settings.tokenizer, settings.model, settings.data
        ),
    )


def base(place: Place) -> None:
    """Tokenise, then pretrain and export the base."""
    do(place.tokens(), "clear", lambda out: base_step.make_tokens(place, out))
    do(
        place.base(),
        "resume",
        lambda out: base_step.train_and_export(
            out,
            place.root / "tokenizer",
            place.root / "tokens" / base_step.STREAM,
            place.settings.base,
            place.settings.data.seq_length,
        ),
    )


STEPS: dict[str, Callable[[Place], None]] = {"corpus": corpus, "tokenizer": tokenizer, "base": base}


def main() -> int:
    """Return the exit code: 0, or 2 for a problem that the user can fix."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("steps", nargs="*", choices=[[], *STEPS], metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--corpus", type=Path, default=os.environ.get("L0MOE_REPRODUCTION_CORPUS"))
    parser.add_argument("--out", type=Path, default=Path("runs/reproduction"))
    parser.add_argument("--settings", type=Path, default=HERE / "settings.yaml")
    arguments = parser.parse_args()
    if arguments.corpus is None:
        parser.error("--corpus, or the variable L0MOE_REPRODUCTION_CORPUS, must name the corpus' folder")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        place = Place(arguments.out, load_settings(arguments.settings), arguments.corpus)
        for name in arguments.steps or STEPS:
            STEPS[name](place)
    except L0MoEError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

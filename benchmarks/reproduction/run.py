#!/usr/bin/env python3
"""The reproduction in small, one command; steps corpus, tokenizer, base, methods, control, speed, tables: README.md.

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
import control_step
import corpus_step
import methods_step
import speed_step
import tables_step
import tokenizer_step
from results import BASE
from runs_table import load_table
from settings import Place, PretrainedSettings, load_settings
from steps import alone, do
from training_record import record_base

from megatron_l0moe.errors import L0MoEError

HERE = Path(__file__).resolve().parent
CORPUS_VARIABLE = "L0MOE_REPRODUCTION_CORPUS"


def corpus(place: Place, arguments: argparse.Namespace) -> None:
    """Split the corpus."""
    settings = place.settings.corpus
    do(place.corpus(), "clear", lambda out: corpus_step.split_corpus(place.source, out, settings))


def tokenizer(place: Place, arguments: argparse.Namespace) -> None:
    """Train the tokenizer and write the model's config; a base that was there has them."""
    if place.is_pretrained:
        return
    own, train = place.own_base, place.root / "corpus" / "train"
    do(
        place.tokenizer(),
        "clear",
        lambda out: tokenizer_step.make_model_folder(
            train, out, own.tokenizer, own.model, place.settings.data
        ),
    )


def base(place: Place, arguments: argparse.Namespace) -> None:
    """Tokenise, then pretrain and export the base, or link one that was there; measure it."""
    settings = place.settings
    if isinstance(settings.base, PretrainedSettings):
        model, tokens = Path(settings.base.path), 0
        do(place.base(), "clear", lambda out: base_step.link_base(model, out))
        do(place.tokens(), "clear", lambda out: base_step.make_tokens(place, out))
    else:
        training, seq_length = settings.base.training, settings.data.seq_length
        index = place.root / "tokens" / base_step.STREAM
        do(place.tokens(), "clear", lambda out: base_step.make_tokens(place, out))
        do(
            place.base(),
            "resume",
            lambda out: base_step.train_and_export(
                out, place.root / "tokenizer", index, training, seq_length
            ),
        )
        tokens = training.steps * training.global_batch_size * seq_length
    methods_step.measure(place, BASE, place.base_model, tokens)
    record_base(place)


def methods(place: Place, arguments: argparse.Namespace) -> None:
    """Do the runs of the table."""
    table = load_table(arguments.runs)
    cases = table.cases(arguments.only)
    for wait in (False, True):  # what another process does is left to it, and waited for in the end
        for case in cases:
            with alone(place.root / methods_step.METHODS / case.name, wait=wait) as mine:
                if mine:
                    methods_step.run_case(place, table, case)


def control(place: Place, arguments: argparse.Namespace) -> None:
    """Compare the ways to hold the retention."""
    control_step.run_controls(place, load_table(arguments.runs))


def speed(place: Place, arguments: argparse.Namespace) -> None:
    """Time what has been made against the base."""
    speed_step.time_rows(place, load_table(arguments.runs))


def tables(place: Place, arguments: argparse.Namespace) -> None:
    """Write the tables."""
    tables_step.write_tables(place, load_table(arguments.runs), arguments.results)


STEPS: dict[str, Callable[[Place, argparse.Namespace], None]] = {
    "corpus": corpus,
    "tokenizer": tokenizer,
    "base": base,
    "methods": methods,
    "control": control,
    "speed": speed,
    "tables": tables,
}


def main() -> int:
    """Return the exit code: 0, or 2 for a problem that the user can fix."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}; none: all")
    parser.add_argument(
        "--corpus",
        type=Path,
        default=os.environ.get(CORPUS_VARIABLE),
        help=f"folder of shards; default: the variable {CORPUS_VARIABLE}",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/reproduction"))
    parser.add_argument("--settings", type=Path, default=HERE / "settings.yaml")
    parser.add_argument("--runs", type=Path, default=HERE / "runs.yaml", help="the table of runs")
    parser.add_argument(
        "--only", nargs="+", metavar="ROW", help="rows or runs (ROW-SEED) that `methods` does"
    )
    parser.add_argument("--results", type=Path, default=HERE.parents[1] / "docs" / "results")
    arguments = parser.parse_args()
    if unknown := set(arguments.steps) - STEPS.keys():
        parser.error(f"unknown step {', '.join(sorted(unknown))}; the steps are {', '.join(STEPS)}")
    if arguments.corpus is None:
        parser.error(f"--corpus, or the variable {CORPUS_VARIABLE}, must name the corpus' folder")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        place = Place(arguments.out, load_settings(arguments.settings), Path(arguments.corpus))
        for name in STEPS:
            if name in arguments.steps or not arguments.steps:
                STEPS[name](place, arguments)
    except L0MoEError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

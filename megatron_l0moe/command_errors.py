"""How a command ends that cannot go on: one sentence on stderr and an exit code, without a traceback."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import typer

from megatron_l0moe.errors import sentence_of

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


@contextlib.contextmanager
def one_sentence(runs_dir: Path) -> Iterator[None]:
    """End every problem that a user can solve with one sentence and an exit code, without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        _fail("Stopped; run the same command to go on.", EXIT_INTERRUPTED)
    except Exception as error:
        sentence = sentence_of(error, runs_dir)
        if sentence is None:
            raise
        _fail(sentence, EXIT_USER_ERROR)


def _fail(sentence: str, code: int) -> None:
    typer.echo(sentence, err=True)
    sys.stderr.flush()
    raise typer.Exit(code)

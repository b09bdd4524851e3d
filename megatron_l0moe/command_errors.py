"""How a command ends that cannot go on: one sentence on stderr and an exit code, without a traceback."""

import contextlib
import errno
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import typer

from megatron_l0moe.errors import L0MoEError

VERBOSE = "L0MOE_VERBOSE"
"""Variable that is 1 where other libraries' warnings are shown: with --verbose, and where the output is a log."""
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
DISK_FULL_TEXT = re.compile(r"No space left on device|Disk quota exceeded|os error (?:28|122)\b")


@contextlib.contextmanager
def one_sentence(runs_dir: Path) -> Iterator[None]:
    """End every problem that a user can solve with one sentence and an exit code, without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        _fail("Stopped; run the same command to go on.", EXIT_INTERRUPTED)
    except Exception as error:
        where = _disk_full(error, runs_dir)
        if where is not None:
            _fail(
                f"No space left on the disk that holds {where}; free some and run the same command to go on.",
                EXIT_USER_ERROR,
            )
        if not isinstance(error, L0MoEError):
            raise
        _fail(str(error), EXIT_USER_ERROR)


def _fail(sentence: str, code: int) -> None:
    typer.echo(sentence, err=True)
    sys.stderr.flush()
    raise typer.Exit(code)


def _disk_full(error: BaseException, otherwise: Path) -> str | Path | None:
    """Find a full disk among the causes of an error and return a path on it; libraries like to wrap it.

    Args:
        otherwise: returned when the error does not name a file.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in DISK_FULL:
            return str(seen.filename) if seen.filename else otherwise
        # By name: importing safetensors here would slow down every command.
        if type(seen).__name__ == "SafetensorError" and DISK_FULL_TEXT.search(str(seen)):
            return otherwise
        # A training job that failed: its own process had the full disk.
        last_line, log = getattr(seen, "last_line", ""), getattr(seen, "log", otherwise)
        if isinstance(seen, L0MoEError) and DISK_FULL_TEXT.search(last_line):
            return Path(log).parent
        seen = seen.__cause__ or seen.__context__
    return None

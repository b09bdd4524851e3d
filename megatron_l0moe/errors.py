"""The one exception that a user is meant to read, and how the errors of the system are put into a sentence."""

import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
DISK_FULL_TEXT = re.compile(r"No space left on device|Disk quota exceeded|os error (?:28|122)\b")
"""What a full disk says where a library keeps the words and loses the number of the error."""
ALMOST_NOTHING = 2**20
"""Bytes; a disk with less is full for every purpose here."""
LONGEST_QUOTE = 120
"""Characters of a path or a value that a sentence repeats."""
_WHY = {
    errno.EROFS: ("lies on a read-only file system", "choose a folder that can be written"),
    errno.EACCES: ("may not be used by this user", "change its permissions, or choose another place"),
    errno.EPERM: ("may not be changed by this user", "change its permissions, or choose another place"),
    errno.ENOTDIR: ("has a file in its path where a folder must be", "choose another place"),
    errno.EEXIST: ("is there already and is no folder", "choose another place, or move it away"),
    errno.EISDIR: ("is a folder, and a file is needed", "choose another place"),
    errno.ENOENT: ("does not exist", "correct the path, or make it"),
    errno.ENAMETOOLONG: ("is a longer name than the file system takes", "choose a shorter one"),
    errno.ELOOP: ("is a link that leads back to itself", "remove the link, or choose another place"),
    errno.EIO: ("could not be read or written by the disk (input/output error)", "look after the disk"),
    errno.EFBIG: ("grew beyond what the file system or `ulimit -f` allows", "raise the limit"),
    errno.ESTALE: ("is gone from the network file system", "look after its server"),
    errno.EMFILE: ("is one open file too many for this process", "raise `ulimit -n`"),
    errno.ENFILE: ("is one open file too many for this machine", "close other programs"),
    errno.ENOMEM: ("could not be held, because the memory is used up", "free some memory"),
}


class L0MoEError(ValueError):
    """A problem the user can fix; the message is one sentence: what, where, the rule, the nearest fix.

    The command line prints it without a traceback and exits with code 2. Any function of the package may raise it; a
    docstring says so only where the condition is not what a reader would expect.
    """


class CorpusChangedError(L0MoEError):
    """The corpus is not what it was when the stage began, so what was made of it cannot be used."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest of ``choices``, or an empty string."""
    if len(name) > LONGEST_QUOTE:
        return ""
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def shortened(text: str) -> str:
    """Return text, or its two ends where it is too long to be repeated in a sentence."""
    half = LONGEST_QUOTE // 2
    return text if len(text) <= LONGEST_QUOTE else f"{text[:half]}...{text[-half:]}"


def disk_full(error: BaseException, otherwise: Path) -> str | Path | None:
    """Find a full disk among the causes of an error and return a path on it; libraries like to wrap it.

    Args:
        otherwise: returned when the error does not name a file.
    """
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in DISK_FULL:
            return shortened(str(cause.filename)) if cause.filename else otherwise
        if not isinstance(cause, L0MoEError) and DISK_FULL_TEXT.search(str(cause)):
            return otherwise
        # A training job that failed: its own process had the full disk.
        if DISK_FULL_TEXT.search(getattr(cause, "last_line", "")):
            return Path(getattr(cause, "log", otherwise)).parent
    return None


def sentence_of(error: BaseException, otherwise: Path) -> str | None:
    """Return what to tell the user of an error; None: it is a bug of ours, and its traceback is wanted.

    Args:
        otherwise: where the command works, for errors that do not name a file.
    """
    if (where := disk_full(error, otherwise)) is not None:
        return f"No space left on the disk that holds {where}; free some and run the same command to go on."
    if isinstance(error, L0MoEError):
        return f"{error}{_log_on_a_full_disk(error)}"
    if not isinstance(error, OSError) or error.errno == errno.EPIPE:  # whoever reads our output has gone
        return None
    return _os_sentence(error, otherwise)


def _os_sentence(error: OSError, otherwise: Path) -> str:
    """Word an error of the operating system, or of a library that raises its own as one."""
    named = error.filename if isinstance(error.filename, str | bytes | os.PathLike) else None
    where = shortened(os.fsdecode(named or otherwise)).encode(errors="backslashreplace").decode()
    if error.errno is None:
        return f"{shortened(' '.join(str(error).split())) or type(error).__name__}."
    why, mend = _WHY.get(error.errno, (f"could not be used ({error.strerror})", "look after the cause"))
    return f"{where} {why}; {mend}, and run the same command again."


def _log_on_a_full_disk(error: BaseException) -> str:
    """Return a further sentence where the log of a failed command may be cut, since its disk is full."""
    for cause in _causes(error):
        log = getattr(cause, "log", None)
        if isinstance(log, Path) and _free_bytes(log.parent) < ALMOST_NOTHING:
            return (
                f" The disk that holds {log.parent} is full, which may be the cause and may have cut the log; free "
                "some space and run the same command to go on."
            )
    return ""


def _free_bytes(folder: Path) -> int:
    try:
        state = os.statvfs(folder)
    except OSError:
        return ALMOST_NOTHING
    return state.f_bavail * state.f_frsize


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__

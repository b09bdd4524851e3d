"""The one exception that a user is meant to read."""

import difflib
from collections.abc import Iterable


class L0MoEError(ValueError):
    """A problem the user can fix; the message is one sentence: what, where, the rule, the nearest fix.

    The command line prints it without a traceback and exits with code 2.
    """


class CorpusChangedError(L0MoEError):
    """The corpus is not what it was when the stage began, so what was made of it cannot be used."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest of ``choices``, or an empty string."""
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""

"""The git tree that this package runs from, if it runs from one: its commit, and what was changed since."""

import subprocess
from pathlib import Path

HERE = Path(__file__).resolve()


def commit() -> str | None:
    """Return the commit of the source tree, with `+changes` when it was edited; None for an installed wheel."""
    head = _git("rev-parse", "HEAD") if _is_tracked() else None
    if head is None:
        return None
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return head.decode().strip() + ("+changes" if changes else "")


def changes() -> bytes:
    """Return the difference to the commit as git words it, in whatever encoding the files have; empty for a wheel."""
    if not _is_tracked():
        return b""
    return _git("diff", "HEAD", "--no-ext-diff", "--no-color") or b""


def untracked() -> list[str]:
    """Return the files of the tree that git neither tracks nor ignores, relative to its top; none for a wheel."""
    if not _is_tracked():
        return []
    listed = _git("ls-files", "--others", "--exclude-standard", "--full-name", "-z", ":/") or b""
    return [name.decode(errors="replace") for name in listed.split(b"\0") if name]


def _is_tracked() -> bool:
    """Say whether this file is of the tree around it: a wheel may lie inside somebody else's."""
    return _git("ls-files", "--error-unmatch", HERE.name) is not None


def _git(*words: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(HERE.parent), *words], capture_output=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None

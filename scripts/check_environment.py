"""Say which installed packages are damaged: one NAME==VERSION a line, exit code 1. Silent and 0 when all is well.

Every file that pip recorded must be there with its recorded size. Nothing heavy is imported, so this takes about
a second; the standard library is enough, because the environment may be half-made.
"""

import csv
import os
import re
import sys
import sysconfig
from pathlib import Path

NEEDED = (
    "torch",
    "megatron_core",
    "transformers",
    "flagembedding",
    "numpy",
    "megatron_l0moe",
    "pytest",
)


def main() -> int:
    """Check all packages of the running interpreter's environment."""
    root = Path(sysconfig.get_paths()["purelib"])
    seen, damaged = set(), []
    for info in sorted(root.glob("*.dist-info")):
        name, _, version = info.name.removesuffix(".dist-info").rpartition("-")
        seen.add(_normal(name))
        if not _whole(root, info):
            damaged.append(f"{name}=={version}")
    missing = [name for name in NEEDED if name not in seen]
    for line in damaged:
        print(line)
    for name in missing:
        print(f"missing: {name}", file=sys.stderr)
    return 1 if damaged or missing else 0


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()


def _whole(root: Path, info: Path) -> bool:
    """Say whether every recorded file is there with its recorded size."""
    try:
        with (info / "RECORD").open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except OSError:
        return False
    for path, _, size in (row for row in rows if len(row) == 3):
        if path.endswith(".pyc"):
            continue
        try:
            found = os.stat(os.path.join(root, path)).st_size
        except OSError:
            return False
        if size and found != int(size):
            return False
    return bool(rows)


if __name__ == "__main__":
    sys.exit(main())

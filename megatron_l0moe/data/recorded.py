"""Files as a finished stage recorded them, compared with the files that are there. No torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_l0moe.data import digests
from megatron_l0moe.data.manifest import CHANGES_AFTERWARDS, MANIFEST, read_manifest
from megatron_l0moe.errors import L0MoEError


@dataclass(frozen=True)
class Recorded:
    """Files of one folder."""

    folder: Path
    sizes: Mapping[str, int]
    """Bytes by name."""
    sha256: Mapping[str, str]
    """Of the same files; those that an earlier version wrote, and those that no stage reads, have none."""

    def only(self, names: Iterator[str]) -> "Recorded":
        """Return some of the files."""
        kept = set(names)
        return Recorded(
            self.folder,
            {name: size for name, size in self.sizes.items() if name in kept},
            {name: digest for name, digest in self.sha256.items() if name in kept},
        )

    def begin(self) -> None:
        """Begin to read the files whose size is right, in threads."""
        for name in self.sha256:
            if self._size_problem(name) is None:
                digests.begin(self.folder / name)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (name, problem) of each file that is not as recorded, sizes before contents."""
        wrong = {name: problem for name in self.sizes if (problem := self._size_problem(name)) is not None}
        yield from wrong.items()
        self.begin()
        for name, digest in self.sha256.items():
            if name not in wrong and digests.begin(self.folder / name).result() != digest:
                yield name, "is not the file that was written (its sha256 differs)"

    def _size_problem(self, name: str) -> str | None:
        file = self.folder / name
        if not file.is_file():
            return "is missing"
        found = file.stat().st_size
        return None if found == self.sizes[name] else f"has {found} bytes instead of {self.sizes[name]}"


def recorded_outputs(folder: Path) -> Recorded:
    """Return the outputs of a finished stage as its manifest has them; none where there is no manifest.

    Raises:
        L0MoEError: the manifest is damaged.
    """
    found = _recorded(folder, read_manifest(folder), "outputs", folder / MANIFEST)
    return found.only(name for name in found.sizes if Path(name).name not in CHANGES_AFTERWARDS)


def recorded_model(folder: Path) -> Recorded | None:
    """Return the dense model's files as a stage recorded them; None where it did not.

    Raises:
        L0MoEError: the manifest is damaged.
    """
    model = read_manifest(folder).get("model")
    if model is None:
        return None
    if not isinstance(model, dict) or not isinstance(model.get("path"), str):
        raise _damaged(folder / MANIFEST)
    return _recorded(Path(model["path"]), model, "sizes", folder / MANIFEST)


def _recorded(folder: Path, values: dict[str, Any], sizes_key: str, file: Path) -> Recorded:
    sizes, sha256 = values.get(sizes_key, {}), values.get("sha256", {})
    if (
        not isinstance(sizes, dict)
        or not isinstance(sha256, dict)
        or not all(type(size) is int for size in sizes.values())
        or not all(isinstance(digest, str) for digest in sha256.values())
        or not sha256.keys() <= sizes.keys()
    ):
        raise _damaged(file)
    return Recorded(folder, sizes, sha256)


def _damaged(file: Path) -> L0MoEError:
    return L0MoEError(
        f"{file} does not list files by size and sha256; restore it, or remove {file.parent} to make it anew."
    )

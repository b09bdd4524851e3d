"""The folder of a curate stage while it is being made: what an interrupted run left is used where it still fits."""

import fnmatch
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_l0moe.errors import CorpusChangedError, L0MoEError
from megatron_l0moe.runs.stage_folder import WORK, write_text

VERSION = 1
"""Of the files in the work folder."""
IDENTITY = "identity"
OUTPUTS = (
    "iter_*", "*.ccm.*", "heldout.jsonl", "clusters.npz", "ccm.json", "quarantine.jsonl", "summary.json",
)  # fmt: skip
"""What the stage makes beside its work folder."""


@dataclass(frozen=True)
class Workspace:
    """A stage folder and what decides its content."""

    out: Path
    """Absolute."""
    identity: str

    @classmethod
    def begin(cls, out: Path, decides: dict[str, Any]) -> "Workspace":
        """Go on in ``out`` if the work there is of the same settings and corpus, else clear it.

        Args:
            out: folder of the stage.
            decides: settings and the state of the corpus.
        """
        text = json.dumps([VERSION, decides], sort_keys=True)
        workspace = cls(out.resolve(), hashlib.sha256(text.encode()).hexdigest())
        if workspace._found() != workspace.identity:
            workspace.clear()
            write_text(workspace.work / IDENTITY, workspace.identity)
        workspace._drop_partial_files()
        return workspace

    @property
    def work(self) -> Path:
        """Folder for what is needed until the stage is done."""
        return self.out / WORK

    def clear(self) -> None:
        """Remove everything that the stage made, and nothing else."""
        (self.work / IDENTITY).unlink(missing_ok=True)  # first: what is left if this is killed is not used
        shutil.rmtree(self.work, ignore_errors=True)
        for pattern in OUTPUTS:
            for path in self.out.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def check_current(self) -> None:
        """Stop a task whose driver is gone and whose folder another one has taken over.

        Raises:
            L0MoEError: the folder is used for other settings or another corpus now.
        """
        if self._found() != self.identity:
            raise L0MoEError(
                f"{self.work} was begun anew by another command; this task ends without a result."
            )

    def refuse_later(self, error: CorpusChangedError) -> None:
        """Make sure that the next start begins anew, although the corpus may look the same."""
        (self.work / IDENTITY).unlink(missing_ok=True)

    def _drop_partial_files(self) -> None:
        """Remove what a killed driver was writing: the hidden names of `manifest.write_text` are never the same."""
        for path in self.out.glob(".*"):
            if path.is_file() and any(fnmatch.fnmatchcase(path.name, f".{name}*") for name in OUTPUTS):
                path.unlink()

    def _found(self) -> str:
        file = self.work / IDENTITY
        return file.read_text(encoding="utf-8") if file.is_file() else ""

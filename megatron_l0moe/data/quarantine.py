"""Bad input is set aside, counted by reason and written down; too much of it stops the stage.

One bad line in a million must not cost a night, and a corpus in the wrong form must not pass as an empty one.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs.stage_folder import write_text

MAX_ENTRIES = 100_000
"""Entries that are written down; all are counted."""
QUOTED_BYTES = 200


class Quarantine:
    """What could not be read, where, and why."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        """Documents by reason."""
        self.side_reasons: Counter[str] = Counter()
        """Lines of files beside the documents, such as quality signals, by reason."""
        self.broken_shards: dict[str, str] = {}
        """Shards that cannot be read to their end, with the reason."""
        self._entries: list[str] = []
        self._first = ""

    @classmethod
    def merged(cls, parts: "Iterable[Quarantine]") -> "Quarantine":
        """Return what several parts of a corpus hold together, in their order."""
        whole = cls()
        for part in parts:
            whole.reasons.update(part.reasons)
            whole.side_reasons.update(part.side_reasons)
            whole.broken_shards |= part.broken_shards
            whole._entries += part._entries[: MAX_ENTRIES - len(whole._entries)]
            whole._first = whole._first or part._first
        return whole

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Quarantine":
        """Return the quarantine that ``record`` was made of."""
        quarantine = cls()
        quarantine.reasons.update(record["reasons"])
        quarantine.side_reasons.update(record["side_reasons"])
        quarantine.broken_shards |= record["broken_shards"]
        quarantine._entries, quarantine._first = record["entries"], record["first"]
        return quarantine

    def record(self) -> dict[str, Any]:
        """Return everything as values that JSON has."""
        return {
            "reasons": dict(self.reasons),
            "side_reasons": dict(self.side_reasons),
            "broken_shards": self.broken_shards,
            "entries": self._entries,
            "first": self._first,
        }

    def add(
        self, shard: str, line: int, reason: str, detail: str, content: bytes = b"", *, side: bool = False
    ) -> None:
        """Set one document aside, or (``side``) a line of a file beside the documents."""
        (self.side_reasons if side else self.reasons)[reason] += 1
        self._first = self._first or f"line {line} of {shard} {detail}"
        self._write(shard, line, reason, detail, content)

    def add_shard(self, shard: str, line: int, detail: str) -> None:
        """Note that ``shard`` cannot be read from ``line`` on."""
        self.broken_shards.setdefault(shard, detail)
        self._write(shard, line, "broken shard", detail, b"")

    def _write(self, shard: str, line: int, reason: str, detail: str, content: bytes) -> None:
        if len(self._entries) < MAX_ENTRIES:
            head = content[:QUOTED_BYTES].decode("utf-8", errors="backslashreplace")
            entry = {"shard": shard, "line": line, "reason": reason, "detail": detail, "head": head}
            self._entries.append(json.dumps(entry))

    def save(self, path: Path) -> None:
        """Write one JSON line for each entry; without entries there is no file."""
        path.unlink(missing_ok=True)
        if self._entries:
            write_text(path, "\n".join(self._entries) + "\n")

    def check(self, corpus: str, *, read: int, shards: int, limit: float, written_to: Path | None) -> None:
        """Stop when more was set aside than the recipe allows.

        Args:
            corpus: its name, for the message.
            read: documents that could be read.
            shards: of the corpus.
            limit: ``data.max_quarantined``, a fraction of the documents and of the shards.
            written_to: where the entries are, if anywhere.

        Raises:
            L0MoEError: it was more; the message names the first case.
        """
        where = f"see {written_to}, " if written_to else ""
        if len(self.broken_shards) > limit * shards:
            name, detail = next(iter(self.broken_shards.items()))
            raise L0MoEError(
                f"{len(self.broken_shards)} of {shards} shard(s) of corpus {corpus} cannot be read to the end (shard "
                f"{name} {detail}); {where}copy or download them again, or go on without their rest by raising "
                f"data.max_quarantined ({limit:g})."
            )
        reasons = self.reasons + self.side_reasons
        bad = reasons.total()
        if bad > limit * (bad + read):
            kinds = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            raise L0MoEError(
                f"{bad} of {bad + read} document(s) of corpus {corpus} cannot be used ({kinds}): {self._first}; "
                f"{where}repair or delete those lines, or go on without them by raising data.max_quarantined "
                f"({limit:g})."
            )

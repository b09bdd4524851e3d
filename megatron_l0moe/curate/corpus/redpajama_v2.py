"""Reader of RedPajama v2: documents, quality signals and duplicates of a shard, joined by document id.

The public release lies in three trees of the same shape, TAG = SNAPSHOT/NUMBER/LANGUAGE_BUCKET:

    documents/TAG.json.gz                 a line: raw_content, language, url, perplexity, bucket, ...
    quality_signals/TAG.signals.json.gz   a line: id, quality_signals {name: [[start, end, value], ...]}
    duplicates/TAG.duplicates.parquet     columns shard_id, doc_id, digest: repetitions of others

A document's id is `TAG.json.gz/ROW`, ROW counted from 0. The bucket `tail` has no signals and no duplicates. Signals
are in the order of the documents, so both are read in step and nothing but one shard's duplicate rows is held.
"""

from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document
from datatrove.io import DataFolder

from megatron_l0moe.curate.corpus.lines import BrokenShardError, Quarantine, read_lines
from megatron_l0moe.curate.corpus.readers import (
    FOLDER,
    UNKNOWN,
    BadDocumentError,
    JsonLinesReader,
    folder_of,
    parse_json,
)

DOCUMENTS, SUFFIX = "documents/", ".json.gz"


class RedPajamaV2Reader(JsonLinesReader):
    """Documents of v2; their metadata holds `signals` ({name: spans}, None: not rated) and `listed_duplicate`."""

    text_keys = ("raw_content",)

    def __init__(
        self,
        folder: DataFolder,
        domain_key: str | None = None,
        *,
        with_signals: bool = True,
        with_duplicates: bool = True,
    ) -> None:
        """Make a reader; signals and duplicates are joined to the documents where they are asked for."""
        super().__init__(folder, domain_key)
        self._with_signals = with_signals
        self._with_duplicates = with_duplicates

    def read_rows(self, shard: str, wanted: Collection[int] | None = None) -> Iterator[Document]:
        """Yield documents in order; documents that are read again (``wanted``) are not rated again."""
        documents = super().read_rows(shard, wanted)
        if wanted is not None:
            yield from documents
            return
        tag = shard.removeprefix(DOCUMENTS).removesuffix(SUFFIX)
        ratings = _Ratings(self.data_folder, tag, self.quarantine) if self._with_signals else None
        listed = self._listed_duplicates(tag) if self._with_duplicates else set()
        try:
            for document in documents:
                row = document.metadata["line"] - 1
                document.metadata["signals"] = ratings.of(row) if ratings else None
                document.metadata["listed_duplicate"] = row in listed
                yield document
        finally:
            if ratings:
                ratings.close()

    def describe(self, shard: str, record: dict[str, Any]) -> dict[str, Any]:
        """Return language and domain of a record; the web is one source, so the language is the domain.

        With `data.domain_key` the folder is that of the snapshot.
        """
        said = super().describe(shard, record)
        language = said["language"] or shard.rsplit("/", 1)[-1].partition("_")[0]
        if self.domain_key == FOLDER:
            domain = folder_of(shard.removeprefix(DOCUMENTS))
        else:
            domain = said["domain"] if self.domain_key else language or UNKNOWN
        return {"domain": domain, "language": language}

    def _listed_duplicates(self, tag: str) -> set[int]:
        """Return the rows of the shard that the duplicates file lists; none without such a file."""
        name = f"duplicates/{tag}.duplicates.parquet"
        if not self.data_folder.exists(name):
            return set()
        try:
            with self.data_folder.open(name, "rb") as file:
                ids = pq.read_table(file, columns=["doc_id"])["doc_id"].to_pylist()
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            self.quarantine.add_shard(name, 1, f"cannot be read ({' '.join(str(error).split())[:200]})")
            return set()
        rows = set()
        for line, doc_id in enumerate(ids, start=1):
            row = row_of(doc_id, tag)
            if row is None:
                self.quarantine.add(name, line, "id of another shard", f"has the id {doc_id!r}", side=True)
            else:
                rows.add(row)
        return rows


class _Ratings:
    """The quality signals of one shard, read in step with its documents."""

    def __init__(self, folder: DataFolder, tag: str, quarantine: Quarantine) -> None:
        self._name = f"quality_signals/{tag}.signals.json.gz"
        self._tag = tag
        self._quarantine = quarantine
        self._file = folder.open(self._name, "rb") if folder.exists(self._name) else None
        self._records = self._read() if self._file else iter(())
        self._row, self._signals = -1, None

    def of(self, row: int) -> dict[str, Any] | None:
        """Return the signals of a row, None where there are none; rows are asked for in ascending order."""
        while self._row < row:
            self._row, self._signals = next(self._records, (1 << 62, None))
        return self._signals if self._row == row else None

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()

    def _read(self) -> Iterator[tuple[int, Any]]:
        last, line = -1, 0
        try:
            for line, content in read_lines(self._file, self._name):  # type: ignore[arg-type]
                try:
                    row, signals = self._parse(content, last)
                except BadDocumentError as error:
                    reason, detail = error.args
                    self._quarantine.add(self._name, line, reason, detail, content or b"", side=True)
                    continue
                last = row
                yield row, signals
        except (BrokenShardError, OSError) as error:
            self._quarantine.add_shard(self._name, line + 1, str(error))

    def _parse(self, content: bytes | None, last: int) -> tuple[int, dict[str, Any]]:
        record = parse_json(content)
        signals = record.get("quality_signals") if isinstance(record, dict) else None
        if not isinstance(signals, dict):
            raise BadDocumentError("bad signals", "has no mapping `quality_signals`")
        row = row_of(record.get("id"), self._tag)
        if row is None:
            raise BadDocumentError("id of another shard", f"has the id {record.get('id')!r}")
        if row == last:
            raise BadDocumentError("duplicate id", f"repeats the id {record['id']!r}")
        if row < last:
            raise BadDocumentError("id out of order", f"has the id {record['id']!r} after row {last}")
        return row, signals


def row_of(doc_id: object, tag: str) -> int | None:
    """Return the row (from 0) that an id of this shard names, or None."""
    prefix = f"{tag}{SUFFIX}/"
    if not isinstance(doc_id, str) or not doc_id.startswith(prefix):
        return None
    digits = doc_id.removeprefix(prefix)
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else None

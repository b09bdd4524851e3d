"""Reader of Parquet shards, whose rows are records like those of JSON lines, and the choice between the two."""

from bisect import bisect_right
from collections.abc import Collection, Iterator
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document
from datatrove.io import DataFolder

from megatron_l0moe.data.lines import HEAD_BYTES, BrokenShardError, is_compressed, is_text
from megatron_l0moe.data.readers import (
    BadDocumentError,
    JsonLinesReader,
    ShardReader,
    check_text,
    decode,
    document,
)
from megatron_l0moe.data.records import RECORD_KEYS, TEXT_KEYS, text_key
from megatron_l0moe.errors import L0MoEError

BATCH_ROWS = 256
"""Rows that are held at a time; a row can be megabytes."""
MAGIC = b"PAR1"


class ParquetRowsReader(ShardReader):
    """Rows of Parquet files; row i from 1 is line i. Row groups without a wanted row are not read."""

    def rows(self, shard: str, wanted: Collection[int] | None) -> Iterator[tuple[int, Any]]:
        """Yield (row number, (text, {column: value})) of the wanted rows; the text as bytes: it may not be UTF-8.

        Raises:
            BrokenShardError: the file is damaged or cut off.
            L0MoEError: it has no column of text.
        """
        try:
            with self.data_folder.open(shard, "rb") as file, pq.ParquetFile(file) as table:
                columns = self._columns(shard, table.schema_arrow)
                sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
                starts = list(accumulate(sizes, initial=1))
                needed = None if wanted is None else {bisect_right(starts, row) - 1 for row in wanted}
                for group in range(table.num_row_groups):
                    if needed is None or group in needed:
                        yield from self._group(table, group, columns, starts[group], wanted)
        except (pa.ArrowException, EOFError, MemoryError) as error:
            problem = " ".join(str(error).split())[:200]
            raise BrokenShardError(f"is not valid Parquet data ({problem})") from error

    def parse(self, shard: str, line: int, content: Any) -> Document:
        """Make a document of a row."""
        text, record = content
        if text is None:
            raise BadDocumentError("no text", "has no value in the column of the text")
        text = decode(text, first=False)
        check_text(text)
        return document(shard, line, text, **self.describe(shard, record))

    def _columns(self, shard: str, schema: pa.Schema) -> list[str]:
        """Return the column of the text, and then those that are looked at for domain and language."""
        text = text_key(schema.names)
        if text is None:
            raise L0MoEError(
                f"Parquet shard {shard} has no column `{'` or `'.join(TEXT_KEYS)}` but "
                f"{', '.join(schema.names) or 'none'}; rename the column that holds the text to `text`."
            )
        kind = schema.field(text).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise L0MoEError(
                f"Column `{text}` of Parquet shard {shard} has type {kind}; it must be of strings."
            )
        key = self.domain_key or ""
        others = dict.fromkeys([*RECORD_KEYS, key, key.partition(".")[0]])
        return [text, *(name for name in others if name in schema.names and name != text)]

    def _group(
        self, table: Any, group: int, columns: list[str], start: int, wanted: Collection[int] | None
    ) -> Iterator[tuple[int, Any]]:
        batches = table.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=columns)
        for batch in batches:
            texts = batch.column(columns[0])
            texts = texts.dictionary_decode() if pa.types.is_dictionary(texts.type) else texts
            binary = pa.large_binary() if pa.types.is_large_string(texts.type) else pa.binary()
            texts = texts.cast(binary)
            for i in range(len(batch)):
                if wanted is None or start + i in wanted:
                    others = {name: _value(batch.column(name)[i]) for name in columns[1:]}
                    yield start + i, (texts[i].as_py(), others)
            start += len(batch)


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py(maps_as_pydicts="lossy")
    except UnicodeDecodeError:
        return None


class RecordsReader(ShardReader):
    """Reads each shard as what it holds, Parquet or JSON lines, whatever its name says."""

    def __init__(self, folder: DataFolder, domain_key: str | None = None) -> None:
        """Make a reader of both forms with one quarantine."""
        super().__init__(folder, domain_key)
        self._lines, self._parquet = (
            JsonLinesReader(folder, domain_key),
            ParquetRowsReader(folder, domain_key),
        )
        self._lines.quarantine = self._parquet.quarantine = self.quarantine

    def read_rows(self, shard: str, wanted: Collection[int] | None = None) -> Iterator[Document]:
        """Yield the documents of a shard in order; with ``wanted`` only those lines or rows."""
        return (self._parquet if self._is_parquet(shard) else self._lines).read_rows(shard, wanted)

    def _is_parquet(self, shard: str) -> bool:
        """Tell by the first bytes; a file that is named Parquet and is no text either is a damaged one."""
        try:
            with self.data_folder.open(shard, "rb") as file:
                head = file.read(HEAD_BYTES)
        except OSError:
            return False  # the reader says so
        named = shard.lower().endswith(".parquet")
        return head.startswith(MAGIC) or (named and not (is_text(head) or is_compressed(head)))

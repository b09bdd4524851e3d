"""Reader of Parquet shards: columns `text`, and where they exist `meta` (struct or JSON), `source`, `language`."""

import json
from bisect import bisect_right
from collections.abc import Collection, Iterator
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document

from megatron_l0moe.data.lines import BrokenShardError
from megatron_l0moe.data.readers import (
    BadDocumentError,
    ShardReader,
    check_text,
    decode,
    document,
    domain_of,
    language_of,
)
from megatron_l0moe.errors import L0MoEError

BATCH_ROWS = 256
"""Rows that are held at a time; a row can be megabytes."""
TEXT = "text"
META = ("meta", "source", "language")


class ParquetRowsReader(ShardReader):
    """Rows of Parquet files; row i from 1 is line i. Row groups without a wanted row are not read."""

    def rows(self, shard: str, wanted: Collection[int] | None) -> Iterator[tuple[int, Any]]:
        """Yield (row number, {column: value}) of the wanted rows; the text as bytes, since it may not be UTF-8.

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
        if content[TEXT] is None:
            raise BadDocumentError("no text", f"has no value in column `{TEXT}`")
        text = decode(content[TEXT], first=False)
        check_text(text)
        meta = _as_mapping(content.get("meta"))
        domain = domain_of(meta if isinstance(meta, dict) and "source" in meta else content)
        language = language_of(meta) or language_of(content)
        return document(shard, line, text, domain=domain, language=language)

    def _columns(self, shard: str, schema: pa.Schema) -> list[str]:
        if TEXT not in schema.names:
            raise L0MoEError(
                f"Parquet shard {shard} has no column `{TEXT}` but {', '.join(schema.names) or 'none'}; rename the "
                f"column that holds the text to `{TEXT}`."
            )
        kind = schema.field(TEXT).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise L0MoEError(
                f"Column `{TEXT}` of Parquet shard {shard} has type {kind}; it must be of strings."
            )
        return [TEXT, *(name for name in META if name in schema.names)]

    def _group(
        self, table: Any, group: int, columns: list[str], start: int, wanted: Collection[int] | None
    ) -> Iterator[tuple[int, Any]]:
        batches = table.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=columns)
        for batch in batches:
            texts = batch.column(TEXT)
            texts = texts.dictionary_decode() if pa.types.is_dictionary(texts.type) else texts
            binary = pa.large_binary() if pa.types.is_large_string(texts.type) else pa.binary()
            texts = texts.cast(binary)
            for i in range(len(batch)):
                if wanted is None or start + i in wanted:
                    others = {name: _value(batch.column(name)[i]) for name in columns[1:]}
                    yield start + i, {TEXT: texts[i].as_py(), **others}
            start += len(batch)


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return None


def _as_mapping(meta: Any) -> Any:
    """Return `meta`, parsed if it is JSON text."""
    if not isinstance(meta, str):
        return meta
    try:
        return json.loads(meta)
    except (ValueError, RecursionError):
        return None

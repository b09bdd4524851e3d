"""Readers of single shards as datatrove pipeline steps: JSON lines, plain text, Parquet.

Every reader is a datatrove `BaseDiskReader`, so it runs by itself in a pipeline on any executor, on local paths and
fsspec URLs. datatrove's own JsonlReader and ParquetReader are not enough here: they pass over a bad line with a line in
the log, give up the rest of a file at a bad byte, and do not see a truncated zstd frame. Ours count and keep what they
pass over. `read_rows` also reads single documents again, by their place.

A document is a datatrove `Document`: text, id ("shard:line"), and metadata with `shard`, `line` (from 1), `domain`,
`language`, and what a format adds. A record's text, domain and language are found in the same way in every format;
domains by the keys that published corpora use:

    meta.source                  RedPajama v1: C4, GitHub, StackExchange, and what others made in its form
    meta.redpajama_set_name      SlimPajama
    meta.pile_set_name           the Pile
    source                       Common Crawl in RedPajama v1, Dolma, CulturaX
    red_pajama_subset            RedPajama v1 as the datasets library writes it
    metadata.source              what datatrove writes

and, where a record has none of them, by a folder or file that is named as a part of RedPajama v1, whose arXiv, books
and Wikipedia name no source. Anything else is named by `data.domain_key`.
"""

import codecs
import json
import re
from bisect import bisect_right
from collections.abc import Collection, Iterator
from itertools import accumulate
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document
from datatrove.io import DataFolder
from datatrove.pipeline.readers.base import BaseDiskReader

from megatron_l0moe.curate.corpus.lines import (
    HEAD_BYTES,
    MAX_LINE_BYTES,
    BrokenShardError,
    Quarantine,
    is_compressed,
    is_text,
    read_chunks,
    read_lines,
)
from megatron_l0moe.errors import L0MoEError

UNKNOWN = "unknown"
FOLDER = "folder"
"""The `data.domain_key` that takes the first folder of a shard for the domain of its documents."""
TEXT_KEYS = ("text", "content", "raw_content")
"""Keys of the text by preference: nearly all; the Stack, StarCoder, OSCAR; RedPajama v2."""
RECORD_KEYS = ("meta", "metadata", "source", "red_pajama_subset", "language")
"""Other keys that are looked at."""
PARTS = ("arxiv", "book", "books", "c4", "common_crawl", "github", "stackexchange", "wikipedia")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@]*@)?([^/?#:]*)")
_PART = re.compile(rf"({'|'.join(sorted(PARTS, key=len, reverse=True))})(?![a-z0-9])")


def text_key(of_record: Collection[str], keys: tuple[str, ...] = TEXT_KEYS) -> str | None:
    """Return the first of ``keys`` that is one of a record's, None if none is."""
    return next((key for key in keys if key in of_record), None)


def domain_of(record: dict[str, Any], shard: str, *, key: str | None = None, root: str = "") -> str:
    """Return the source domain of a record, ``UNKNOWN`` if nothing names it.

    A name goes up to its first slash, since Common Crawl lines of RedPajama v1 carry
    `cc/2019-30/en_middle_0053.json.gz/line405796`. An address names a document, not a domain, unless ``key`` asks for
    it: then it is its host.

    Args:
        record: the parsed record.
        shard: path of its file below the corpus folder.
        key: `data.domain_key`: a dotted path in the record, or ``FOLDER``.
        root: name of the corpus folder.
    """
    if key == FOLDER:
        return folder_of(shard)
    if key is not None:
        return _name(_value_at(record, key), chosen=True) or UNKNOWN
    return next(filter(None, map(_name, _known_values(record))), "") or _part_of(shard, root) or UNKNOWN


def folder_of(shard: str) -> str:
    """Return the first folder of a shard's path, ``UNKNOWN`` for a file at the top."""
    folder, _, rest = shard.partition("/")
    return folder if rest else UNKNOWN


def language_of(record: dict[str, Any]) -> str:
    """Return the language code of a record, or "" (in RedPajama v1's GitHub part it is a list of others)."""
    places = (_mapping(record.get("meta")), record, _mapping(record.get("metadata")))
    return next((code for place in places if isinstance(code := place.get("language"), str) and code), "")


def _known_values(record: dict[str, Any]) -> Iterator[Any]:
    meta = _mapping(record.get("meta"))
    yield from map(meta.get, ("source", "redpajama_set_name", "pile_set_name"))
    yield from map(record.get, ("source", "red_pajama_subset"))
    yield _mapping(record.get("metadata")).get("source")


def _value_at(record: dict[str, Any], path: str) -> Any:
    if path in record:  # a flattened table has columns with dots in their names
        return record[path]
    value: Any = record
    for part in path.split("."):
        value = _mapping(value).get(part)
    return value


def _name(value: Any, *, chosen: bool = False) -> str:
    """Return the name that a value gives, "" if it gives none."""
    if chosen and isinstance(value, int):
        value = str(value)
    if not isinstance(value, str):
        return ""
    if address := _ADDRESS.match(value.strip()):
        return address[1].lower() if chosen else ""
    name = value.split("/", 1)[0].strip()
    return name if name.isprintable() else ""  # half of a surrogate pair, for one, has no place in a report


def _part_of(shard: str, root: str) -> str:
    """Return the part of RedPajama v1 that a folder or the file itself is named as, "" if none is."""
    *folders, file = PurePosixPath(root, shard).parts
    named = next((name.lower() for name in folders if name.lower() in PARTS), "")
    if named:
        return named
    part = _PART.match(file.lower())
    return part[1] if part else ""


def _mapping(value: Any) -> dict[str, Any]:
    """Return a mapping, parsed if it is JSON text; anything else is an empty one."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}


class BadDocumentError(Exception):
    """One document cannot be used; (reason, detail)."""


class ShardReader(BaseDiskReader):
    """Base of the readers: bad documents and broken shards go to a quarantine, the rest is read."""

    def __init__(self, folder: DataFolder, domain_key: str | None = None) -> None:
        """Make a reader.

        Args:
            folder: what the shards' paths begin at.
            domain_key: what names the domain of a document, see `records.domain_of`; None: the known forms.
        """
        super().__init__(folder)
        self.domain_key = domain_key
        self.quarantine = Quarantine()

    def read_file(self, filepath: str) -> Iterator[Document]:
        """Yield the documents of a shard in order."""
        return self.read_rows(filepath)

    def read_rows(self, shard: str, wanted: Collection[int] | None = None) -> Iterator[Document]:
        """Yield the documents of a shard in order; with ``wanted`` only those lines, the others are not parsed."""
        line = 0
        try:
            for line, content in self.rows(shard, wanted):
                try:
                    yield self.parse(shard, line, content)
                except BadDocumentError as error:
                    reason, detail = error.args
                    raw = content if isinstance(content, bytes) else b""
                    self.quarantine.add(shard, line, reason, detail, raw)
        except BrokenShardError as error:
            self.quarantine.add_shard(shard, line + 1, str(error))
        except OSError as error:
            self.quarantine.add_shard(shard, line + 1, f"cannot be read ({error})")

    def describe(self, shard: str, record: dict[str, Any]) -> dict[str, Any]:
        """Return the metadata of a record: domain and language."""
        root = self.data_folder.path.rstrip("/").rpartition("/")[2]
        domain = domain_of(record, shard, key=self.domain_key, root=root)
        return {"domain": domain, "language": language_of(record)}

    def rows(self, shard: str, wanted: Collection[int] | None) -> Iterator[tuple[int, Any]]:
        """Yield (line number from 1, raw content) of the wanted documents; None stands for one that is too long.

        Raises:
            BrokenShardError: the shard cannot be read further.
        """
        raise NotImplementedError

    def parse(self, shard: str, line: int, content: Any) -> Document:
        """Make a document of a row's raw content.

        Raises:
            BadDocumentError: it cannot be used.
        """
        raise NotImplementedError


class JsonLinesReader(ShardReader):
    """One record a line, such as `{"text": ..., "meta": {"source": ..., "language": ...}}`."""

    text_keys: tuple[str, ...] = TEXT_KEYS

    def rows(self, shard: str, wanted: Collection[int] | None) -> Iterator[tuple[int, Any]]:
        """Yield the wanted lines."""
        with self.data_folder.open(shard, "rb") as file:
            for line, content in read_lines(file, shard):
                if wanted is None or line in wanted:
                    yield line, content

    def parse(self, shard: str, line: int, content: Any) -> Document:
        """Parse one line."""
        record = parse_json(content, first=line == 1)
        text = text_of(record, self.text_keys)
        check_text(text)
        return document(shard, line, text, **self.describe(shard, record))


class TextReader(ShardReader):
    """Plain text: a file is a document, and the folder that it lies in (the first one) its domain."""

    def rows(self, shard: str, wanted: Collection[int] | None) -> Iterator[tuple[int, Any]]:
        """Yield the whole file as line 1."""
        pieces, held = [], 0
        with self.data_folder.open(shard, "rb") as file:
            for chunk in read_chunks(file, shard):
                held += len(chunk)
                pieces.append(chunk)
                if held > MAX_LINE_BYTES:
                    yield 1, None
                    return
        yield 1, b"".join(pieces)

    def parse(self, shard: str, line: int, content: Any) -> Document:
        """Decode the file."""
        text = decode(content, first=True)
        check_text(text)
        return document(shard, line, text, domain=folder_of(shard), language="")


def document(shard: str, line: int, text: str, **metadata: Any) -> Document:
    """Return a datatrove document."""
    return Document(text=text, id=f"{shard}:{line}", metadata={"shard": shard, "line": line, **metadata})


def decode(content: bytes | None, *, first: bool) -> str:
    """Decode UTF-8; a byte order mark at the beginning of a file is no text.

    Raises:
        BadDocumentError: it is not UTF-8 or too long.
    """
    if content is None:
        raise BadDocumentError("too long", f"is longer than {MAX_LINE_BYTES} bytes")
    try:
        return (content.removeprefix(codecs.BOM_UTF8) if first else content).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadDocumentError("invalid UTF-8", f"is not valid UTF-8 (byte {error.start})") from error


def parse_json(content: bytes | None, *, first: bool = False) -> Any:
    """Parse one JSON value.

    Raises:
        BadDocumentError: it is none.
    """
    text = decode(content, first=first)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: nested thousands of levels deep
        raise BadDocumentError("not JSON", f"is not valid JSON ({error})") from error


def text_of(record: Any, keys: tuple[str, ...]) -> str:
    """Return the text of a record.

    Raises:
        BadDocumentError: it has none under the keys; the detail says which it has.
    """
    key = text_key(record, keys) if isinstance(record, dict) else None
    text = record[key] if key else None
    if isinstance(text, str):
        return text
    others = f"; its keys are {', '.join(record)[:200]}" if isinstance(record, dict) and record else ""
    raise BadDocumentError("no text", f"has no string `{key or '` or `'.join(keys)}`{others}")


def check_text(text: str) -> None:
    """Refuse text that no tokenizer takes, or that is no text.

    Raises:
        BadDocumentError: it holds half of a surrogate pair or a NUL character.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadDocumentError(
            "lone surrogate", f"has a lone surrogate at character {error.start} of its text"
        ) from error
    if (place := text.find("\0")) >= 0:
        raise BadDocumentError("NUL character", f"has a NUL at character {place} of its text")


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

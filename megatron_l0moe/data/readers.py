"""Readers of single shards as datatrove pipeline steps: JSON lines and plain text.

Every reader is a datatrove `BaseDiskReader`, so it runs by itself in a pipeline on any executor, on local paths and
fsspec URLs. datatrove's own JsonlReader and ParquetReader are not enough here: they pass over a bad line with a line in
the log, give up the rest of a file at a bad byte, and do not see a truncated zstd frame. Ours count and keep what they
pass over. `read_rows` also reads single documents again, by their place.

A document is a datatrove `Document`: text, id ("shard:line"), and metadata with `shard`, `line` (from 1), `domain`,
`language` (see `records.py`), and what a format adds.
"""

import codecs
import json
from collections.abc import Collection, Iterator
from typing import Any

from datatrove.data import Document
from datatrove.io import DataFolder
from datatrove.pipeline.readers.base import BaseDiskReader

from megatron_l0moe.data.lines import MAX_LINE_BYTES, BrokenShardError, read_chunks, read_lines
from megatron_l0moe.data.quarantine import Quarantine
from megatron_l0moe.data.records import TEXT_KEYS, domain_of, folder_of, language_of, text_key


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

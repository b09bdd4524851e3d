"""What a record of a corpus says of itself, the same for every format: its text, source domain and language.

Domains are found by the keys that published corpora use:

    meta.source                  RedPajama v1: C4, GitHub, StackExchange, and what others made in its form
    meta.redpajama_set_name      SlimPajama
    meta.pile_set_name           the Pile
    source                       Common Crawl in RedPajama v1, Dolma, CulturaX
    red_pajama_subset            RedPajama v1 as the datasets library writes it
    metadata.source              what datatrove writes

and, where a record has none of them, by a folder or file that is named as a part of RedPajama v1, whose arXiv, books
and Wikipedia name no source. Anything else is named by `data.domain_key`.
"""

import json
import re
from collections.abc import Collection, Iterator
from pathlib import PurePosixPath
from typing import Any

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

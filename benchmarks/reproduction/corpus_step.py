"""Step `corpus`: split every domain into training and held-out documents, before anything looks at the text."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zstandard
from scanned import scan_corpus
from settings import CorpusSettings

from megatron_l0moe.curate.corpus.catalog import Catalog, read_documents
from megatron_l0moe.errors import L0MoEError

HELDOUT_SHARE = 4
"""A document above 1/4 of a domain's held-out text stays in training: it would be that domain's whole test."""


def split_corpus(source: Path, out: Path, settings: CorpusSettings) -> dict[str, object]:
    """Write out/train and out/heldout, a RedPajama v1 shard for each domain.

    Whole documents are held out, in a random order by place and seed; exact repetitions are dropped first. Training
    documents are cut to `document_chars` at line ends afterwards, so no part of one lies on both sides.

    Raises:
        L0MoEError: a domain has too little text.
    """
    catalog = scan_corpus(source)
    keys = catalog.random_keys(settings.seed)
    counts: dict[str, object] = {}
    for number, domain in enumerate(catalog.domains):
        ids = np.flatnonzero(catalog.rows["domain"] == number)
        held = _held_out(catalog, ids[np.argsort(keys[ids], kind="stable")], settings.heldout_chars)
        train = np.setdiff1d(ids, held)
        counts[domain] = {
            "train": _write(out / "train" / f"{domain}.jsonl.zst", domain, _cut(catalog, train, settings)),
            "heldout": _write(out / "heldout" / f"{domain}.jsonl.zst", domain, _texts(catalog, held)),
        }
    return {"domains": counts, "dropped": dict(catalog.dropped)}


def _held_out(catalog: Catalog, queue: np.ndarray, chars: int) -> np.ndarray:
    fitting = queue[catalog.column("chars")[queue] <= chars // HELDOUT_SHARE]
    ends = np.cumsum(catalog.column("chars")[fitting])
    count = int(np.searchsorted(ends, chars)) + 1
    if count > len(fitting) or len(fitting) == len(queue) == count:
        name = catalog.domains[int(catalog.rows["domain"][queue[0]])]
        raise L0MoEError(
            f"Domain {name!r} has not enough documents of at most {chars // HELDOUT_SHARE} characters to hold out "
            f"{chars} and to train on others; lower corpus.heldout_chars, or give the domain more text."
        )
    return fitting[:count]


def _texts(catalog: Catalog, ids: np.ndarray) -> Iterator[str]:
    return (document.text for _, document in read_documents(catalog, ids))


def _cut(catalog: Catalog, ids: np.ndarray, settings: CorpusSettings) -> Iterator[str]:
    for text in _texts(catalog, ids):
        yield from cut(text, settings.document_chars)


def cut(text: str, limit: int) -> Iterator[str]:
    """Yield the text in parts of at most `limit` characters that end at line ends where the text has any."""
    part = ""
    for line in re.findall(rf".{{0,{limit - 1}}}\n|.{{1,{limit}}}", text):
        if part and len(part) + len(line) > limit:
            yield part
            part = ""
        part += line
    if part.strip():
        yield part


def _write(file: Path, domain: str, texts: Iterator[str]) -> dict[str, int]:
    file.parent.mkdir(parents=True, exist_ok=True)
    documents = chars = 0
    with (
        file.open("wb") as raw,
        zstandard.ZstdCompressor(level=9).stream_writer(raw) as packed,
        io.TextIOWrapper(packed, encoding="utf-8") as out,
    ):
        for text in texts:
            out.write(json.dumps({"text": text, "meta": {"source": domain}}, ensure_ascii=False) + "\n")
            documents += 1
            chars += len(text)
    return {"documents": documents, "chars": chars}

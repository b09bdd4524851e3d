"""The catalog: what is where in the corpus, a few bytes a document, so that texts are read only when needed.

A document number (`id`) is a row of the catalog. Texts are read again from the shards by `read_documents`,
in corpus order.
"""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_l0moe.data.corpus import Document, find_shards, read_shard
from megatron_l0moe.data.progress import Progress
from megatron_l0moe.errors import L0MoEError

logger = logging.getLogger(__name__)

ROW = np.dtype([("shard", "<u4"), ("line", "<u4"), ("domain", "<u2"), ("chars", "<i8"), ("digest", "<u8")])
MAX_DOMAINS = 1024


@dataclass(frozen=True)
class Catalog:
    """Place, source domain and length of every distinct document of a corpus."""

    folder: Path
    shards: list[str]
    domains: list[str]
    """Source domains, sorted by name."""
    rows: npt.NDArray[np.void]
    """[N] of ``ROW``, in corpus order."""
    duplicates: int
    """Documents left out because an earlier one has exactly the same text."""

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> npt.NDArray[np.int64]:
        """Return a column as int64 [N]."""
        return np.asarray(self.rows[name], dtype=np.int64)

    def random_keys(self, seed: int) -> npt.NDArray[np.uint64]:
        """Return a pseudo-random uint64 [N] that depends on each document's place and on the seed only."""
        place = (self.rows["shard"].astype(np.uint64) << np.uint64(32)) | self.rows["line"].astype(np.uint64)
        salt = int.from_bytes(hashlib.blake2b(f"heldout:{seed}".encode(), digest_size=8).digest(), "little")
        return _splitmix64(place ^ np.uint64(salt))


def scan_corpus(folder: Path) -> Catalog:
    """Read the whole corpus once, check every line, and drop exact repetitions of a text.

    Repetitions are dropped because one copy could be held out while the other is trained on.

    Raises:
        L0MoEError: no shard, a broken shard or line (see ``corpus``), no document, or too many domains.
    """
    paths = find_shards(folder)
    shards = [path.relative_to(folder).as_posix() for path in paths]
    numbers: dict[str, int] = {}
    parts: list[npt.NDArray[np.void]] = []
    progress = Progress(logger, "scanned documents")
    for index, (path, name) in enumerate(zip(paths, shards, strict=True)):
        rows = []
        for document in read_shard(path, name):
            domain = numbers.setdefault(document.domain, len(numbers))
            if domain >= MAX_DOMAINS:
                raise L0MoEError(
                    f"Corpus {folder} has more than {MAX_DOMAINS} source domains at document {document.id}; "
                    "`meta.source` must name the domain of a document (such as arxiv), not the document."
                )
            rows.append((index, document.line, domain, len(document.text), _digest(document.text)))
            progress.advance()
        parts.append(np.array(rows, dtype=ROW))
    rows_found = np.concatenate(parts)
    if not len(rows_found):
        raise L0MoEError(
            f"Corpus folder {folder} has {len(shards)} shard(s) but no document; add text to it."
        )
    rows_found["domain"] = _rank(list(numbers))[rows_found["domain"]]
    _, first = np.unique(rows_found["digest"], return_index=True)
    kept = rows_found[np.sort(first)]
    catalog = Catalog(folder, shards, sorted(numbers), kept, len(rows_found) - len(kept))
    logger.info(
        "corpus: %d shards, %d documents (%d exact repetitions left out), %d domains, %.1f MB of text",
        *(len(shards), len(catalog), catalog.duplicates, len(numbers), catalog.column("chars").sum() / 1e6),
    )
    return catalog


def read_documents(catalog: Catalog, ids: npt.NDArray[np.int64]) -> Iterator[tuple[int, Document]]:
    """Yield (id, document) for the distinct ``ids``, in corpus order; shards without any are not opened."""
    wanted = np.unique(ids)
    shard_of = catalog.rows["shard"][wanted]
    for shard in np.unique(shard_of):
        here = wanted[shard_of == shard]
        lines = {int(line): int(i) for line, i in zip(catalog.rows["line"][here], here, strict=True)}
        name = catalog.shards[int(shard)]
        for document in read_shard(catalog.folder / name, name, lines):
            yield lines.pop(document.line), document
            if not lines:
                break
        if lines:
            raise L0MoEError(
                f"Shard {name} of {catalog.folder} changed while it was read; start curate again."
            )


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _rank(names: list[str]) -> npt.NDArray[np.int64]:
    """Return for each name its place in the sorted list of names."""
    return np.argsort(np.argsort(np.array(names)))


def _splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix 64-bit integers (Steele et al. 2014, splitmix64's finaliser); arithmetic is modulo 2**64."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))

"""The catalog: what is where in the corpus, a few bytes a document, so that texts are read only when needed.

A document number (`id`) is a row of the catalog. Texts are read again from the shards by `read_documents`,
in corpus order. The recipe's `data.filters` decide which documents are used, with one reason for each dropped one.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from megatron_l0moe.curate.corpus.lines import Quarantine
from megatron_l0moe.curate.corpus.readers import UNKNOWN, ShardReader
from megatron_l0moe.curate.corpus.shard_files import Corpus
from megatron_l0moe.curate.tasks.units import write_array
from megatron_l0moe.errors import CorpusChangedError, L0MoEError
from megatron_l0moe.recipe.sections import FilterSection
from megatron_l0moe.runs.stage_folder import write_json
from megatron_l0moe.runtime.json_files import read_json

logger = logging.getLogger(__name__)


class DocumentFilter(BaseFilter):
    """Drops empty text, text of one repeated character, and what the settings ask for.

    Exact repetitions across the corpus are the catalog's part, since one document alone does not show them.
    """

    name = "L0-MoE document filter"

    def __init__(self, settings: FilterSection) -> None:
        super().__init__()
        self._settings = settings
        self._languages = None if settings.languages is None else frozenset(settings.languages)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Return True, or (False, reason)."""
        reason = self.reason(doc)
        return (False, reason) if reason else True

    def reason(self, doc: Document) -> str | None:
        """Return why a document is dropped, or None.

        Raises:
            L0MoEError: a quality signal of the recipe is rated by line, not by document, or does not exist.
        """
        text = doc.text
        if not text.strip():
            return "empty text"
        if not text.strip(text[0]):
            return "one repeated character"
        if len(text) < self._settings.min_chars:
            return "shorter than filters.min_chars"
        if self._languages is not None and doc.metadata["language"] not in self._languages:
            return "language not in filters.languages"
        if self._settings.drop_duplicates and doc.metadata.get("listed_duplicate"):
            return "listed in the duplicates file"
        return self._signal_reason(doc) if self._settings.quality_signals else None

    def _signal_reason(self, doc: Document) -> str | None:
        signals = doc.metadata.get("signals")
        if signals is None:
            return "no quality signals"
        for name, limits in self._settings.quality_signals.items():
            value = _value_of(name, signals, doc.id)
            if value is None:
                return f"{name} has no value"
            if limits.min is not None and value < limits.min:
                return f"{name} below its minimum"
            if limits.max is not None and value > limits.max:
                return f"{name} above its maximum"
        return None


def _value_of(name: str, signals: dict[str, Any], document: str) -> float | None:
    """Return the value of a signal that rates a whole document: one span [start, end, value]."""
    spans = signals.get(name)
    if spans is None:
        raise L0MoEError(
            f"data.filters.quality_signals: document {document} has no signal {name!r}; it has "
            f"{', '.join(sorted(signals)) or 'none'}."
        )
    match spans:
        case [[_, _, int() | float() as value]]:
            return None if value != value else value  # NaN is within no range
        case [] | [[_, _, None]]:
            return None
    raise L0MoEError(
        f"data.filters.quality_signals: {name} rates parts of document {document}, not the whole; choose a signal with "
        "one value for a document, such as rps_doc_word_count."
    )


ROW = np.dtype([("shard", "<u4"), ("line", "<u4"), ("domain", "<u2"), ("chars", "<i8"), ("digest", "<u8")])
MAX_DOMAINS = 1024
BLOCK_ROWS = 1 << 14
"""Rows that are held as Python objects, about ten times their size, before they become an array."""
REPETITION = "exact repetition"
MAX_UNKNOWN = 0.1
"""Fraction of the documents that may have no source domain without a warning."""


@dataclass(frozen=True)
class Catalog:
    """Place, source domain and length of every usable document of a corpus."""

    corpus: Corpus
    domains: list[str]
    """Source domains, sorted by name."""
    rows: npt.NDArray[np.void]
    """[N] of ``ROW``, in corpus order."""
    dropped: dict[str, int]
    """Documents left out, by reason, those that are set aside as unreadable among them."""

    def __len__(self) -> int:
        return len(self.rows)

    def save(self, folder: Path) -> None:
        """Write everything to ``folder``, for tasks in other processes."""
        write_array(folder / "rows.npy", self.rows)
        record = {"corpus": self.corpus.record(), "domains": self.domains, "dropped": self.dropped}
        write_json(folder / "catalog.json", record)

    @classmethod
    def load(cls, folder: Path) -> "Catalog":
        """Return what `save` wrote; the rows stay on disk."""
        record = read_json(folder / "catalog.json", "start curate again")
        rows = np.load(folder / "rows.npy", mmap_mode="r")
        return cls(Corpus.from_record(record["corpus"]), record["domains"], rows, record["dropped"])

    def column(self, name: str) -> npt.NDArray[np.int64]:
        """Return a column as int64 [N]."""
        return np.asarray(self.rows[name], dtype=np.int64)

    def random_keys(self, seed: int) -> npt.NDArray[np.uint64]:
        """Return a pseudo-random uint64 [N] that depends on each document's place and on the seed only."""
        place = (self.rows["shard"].astype(np.uint64) << np.uint64(32)) | self.rows["line"].astype(np.uint64)
        salt = int.from_bytes(hashlib.blake2b(f"heldout:{seed}".encode(), digest_size=8).digest(), "little")
        return _splitmix64(place ^ np.uint64(salt))


@dataclass(frozen=True)
class ScanPart:
    """What a scan found in some consecutive shards."""

    rows: npt.NDArray[np.void]
    """[n] of ``ROW``, in corpus order; their domain is a number of this part."""
    domains: list[str]
    """The names of the domains by number, in the order in which they came up."""
    dropped: dict[str, int]
    quarantine: Quarantine


def scan_shards(
    corpus: Corpus, shards: Iterable[int], settings: FilterSection, advance: Callable[[int], None]
) -> ScanPart:
    """Read some shards once, check every document, and drop what the filters ask for.

    Memory: ``ROW`` for each document. ``advance`` is told of every document that was read.
    """
    reader = corpus.reader(
        with_signals=bool(settings.quality_signals), with_duplicates=settings.drop_duplicates
    )
    numbers: dict[str, int] = {}
    dropped: Counter[str] = Counter()
    usable = _usable(corpus, shards, reader, DocumentFilter(settings), numbers, dropped, advance)
    blocks = [np.array(list(block), dtype=ROW) for block in batched(usable, BLOCK_ROWS)]
    rows = np.concatenate(blocks) if blocks else np.empty(0, dtype=ROW)
    return ScanPart(rows, list(numbers), dict(dropped), reader.quarantine)


def merge_scans(
    corpus: Corpus,
    parts: Sequence[ScanPart],
    settings: FilterSection,
    *,
    max_quarantined: float,
    quarantine_file: Path | None,
) -> Catalog:
    """Make the catalog of a corpus from parts that cover all of its shards, in their order.

    Exact repetitions are dropped because one copy could be held out while the other is trained on. What cannot be
    read is listed in ``quarantine_file`` and left out; more than the fraction ``max_quarantined`` of it is refused.
    How the corpus was cut into parts does not change the catalog.

    Raises:
        L0MoEError: too much that is unreadable, no document, or too many domains.
    """
    quarantine = Quarantine.merged(part.quarantine for part in parts)
    dropped = Counter({REPETITION: 0})
    for part in parts:
        dropped.update(part.dropped)
    count = sum(len(part.rows) for part in parts)
    if quarantine_file:
        quarantine.save(quarantine_file)
    quarantine.check(
        corpus.location,
        read=count + dropped.total(),
        shards=len(corpus.shards),
        limit=max_quarantined,
        written_to=quarantine_file,
    )
    if not count:
        raise L0MoEError(_nothing(corpus, dropped))
    domains = sorted({name for part in parts for name in part.domains})
    if len(domains) > MAX_DOMAINS:
        raise L0MoEError(_too_many_domains(corpus, ""))
    rows = np.empty(count, dtype=ROW)
    end = 0
    for part in parts:
        here = rows[end : end + len(part.rows)]
        here[:] = part.rows
        if len(here):
            here["domain"] = np.array([domains.index(name) for name in part.domains])[here["domain"]]
        end += len(here)
    if settings.drop_duplicates:
        _, first = np.unique(rows["digest"], return_index=True)
        dropped[REPETITION] = len(rows) - len(first)
        rows = rows[np.sort(first)]
    dropped.update(quarantine.reasons)
    catalog = Catalog(corpus, domains, rows, dict(dropped))
    _log(catalog)
    _check_domains(catalog)
    return catalog


def _usable(
    corpus: Corpus,
    shards: Iterable[int],
    reader: ShardReader,
    rules: DocumentFilter,
    numbers: dict[str, int],
    dropped: Counter[str],
    advance: Callable[[int], None],
) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield the row of each document that passes the filters; fills the domains' numbers and the counts."""
    for index in shards:
        for document in reader.read_rows(corpus.shards[index]):
            advance(1)
            if reason := rules.reason(document):
                dropped[reason] += 1
                continue
            domain = numbers.setdefault(document.metadata["domain"], len(numbers))
            if domain >= MAX_DOMAINS:
                raise L0MoEError(_too_many_domains(corpus, f" at document {document.id}"))
            yield index, document.metadata["line"], domain, len(document.text), _digest(document.text)


def _too_many_domains(corpus: Corpus, where: str) -> str:
    return (
        f"Corpus {corpus.location} has more than {MAX_DOMAINS} source domains{where}; a domain must be a part of the "
        "corpus (such as arxiv), not a document: set data.domain_key to a key that names it, or to folder."
    )


def _nothing(corpus: Corpus, dropped: Counter[str]) -> str:
    found = f"Corpus folder {corpus.location} has {len(corpus.shards)} shard(s) but no document"
    if not dropped.total():
        return f"{found}; add text to it."
    return f"{found} that is used (left out: {_listed(dropped)}); add text to it, or loosen data.filters."


def read_documents(catalog: Catalog, ids: npt.NDArray[np.int64]) -> Iterator[tuple[int, Document]]:
    """Yield (id, document) for the distinct ``ids``, in corpus order; shards without any are not opened.

    Raises:
        CorpusChangedError: a document is not where it was when the corpus was scanned.
    """
    wanted = np.unique(ids)
    shard_of = catalog.rows["shard"][wanted]
    reader = catalog.corpus.reader()
    for shard in np.unique(shard_of):
        here = wanted[shard_of == shard]
        lines = dict(zip(catalog.rows["line"][here].tolist(), here.tolist(), strict=True))
        name = catalog.corpus.shards[int(shard)]
        for document in reader.read_rows(name, lines):
            number = lines[document.metadata["line"]]
            if _digest(document.text) != catalog.rows["digest"][number]:
                break
            del lines[document.metadata["line"]]
            yield number, document
            if not lines:
                break
        if lines:
            raise CorpusChangedError(
                f"Shard {name} of {catalog.corpus.location} changed while it was read; start curate again."
            )


def _log(catalog: Catalog) -> None:
    logger.info(
        "corpus: %d shards, %d documents, %d domains, %.1f MB of text; left out: %s",
        *(len(catalog.corpus.shards), len(catalog), len(catalog.domains)),
        *(catalog.column("chars").sum() / 1e6, _listed(catalog.dropped)),
    )


def _check_domains(catalog: Catalog) -> None:
    """Warn of documents without a source domain, and refuse a key that no document has."""
    key = catalog.corpus.domain_key
    if key is not None and catalog.domains == [UNKNOWN]:
        raise L0MoEError(
            f"data.domain_key ({key}) names the source domain of none of the {len(catalog)} documents of corpus "
            f"{catalog.corpus.location}; correct it, or leave it out."
        )
    if UNKNOWN not in catalog.domains:
        return
    unknown = int((catalog.rows["domain"] == catalog.domains.index(UNKNOWN)).sum())
    if unknown > MAX_UNKNOWN * len(catalog):
        logger.warning(
            "%d of %d documents have no source domain and count as %r, so that perplexity by domain says little; set "
            "data.domain_key to the key that names it (such as meta.subset), or to folder",
            *(unknown, len(catalog), UNKNOWN),
        )


def _listed(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count) or "nothing"


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix 64-bit integers (Steele et al. 2014, splitmix64's finaliser); arithmetic is modulo 2**64."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))

"""What the steps of curate do by units, in one call: a scanned corpus, a described shard of tokens."""

from pathlib import Path

import numpy as np

from megatron_l0moe.curate.corpus.catalog import Catalog, merge_scans, scan_shards
from megatron_l0moe.curate.corpus.shard_files import Format, open_corpus
from megatron_l0moe.index.index import Shard
from megatron_l0moe.recipe.sections import FilterSection
from megatron_l0moe.runs.stage_folder import sha256_file


def scan_corpus(
    location: str | Path,
    *,
    form: Format = "auto",
    domain_key: str | None = None,
    filters: FilterSection | None = None,
    max_quarantined: float = 0.0,
    quarantine_file: Path | None = None,
) -> Catalog:
    """Scan a whole corpus in this process."""
    settings = filters or FilterSection()
    corpus = open_corpus(str(location), form, domain_key)
    part = scan_shards(corpus, range(len(corpus.shards)), settings, lambda count: None)
    return merge_scans(
        corpus, [part], settings, max_quarantined=max_quarantined, quarantine_file=quarantine_file
    )


def describe_shard(prefix: Path, folder: Path) -> Shard:
    """Return the checksums and sizes of a shard, with its path relative to ``folder``."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return Shard(
        path=prefix.relative_to(folder).as_posix(),
        bin_sha256=sha256_file(Path(f"{prefix}.bin")),
        idx_sha256=sha256_file(Path(f"{prefix}.idx")),
        documents=len(dataset),
        tokens=int(dataset.sequence_lengths.sum(dtype=np.int64)),
    )

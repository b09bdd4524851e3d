"""A folder of shards read as `curate` reads one, without its workspace and workers."""

from pathlib import Path

from megatron_l0moe.curate.corpus.catalog import Catalog, merge_scans, scan_shards
from megatron_l0moe.curate.corpus.shard_files import open_corpus
from megatron_l0moe.recipe.sections import FilterSection


def scan_corpus(folder: Path) -> Catalog:
    """Return the documents of a folder, each once; nothing may be unreadable."""
    corpus, filters = open_corpus(str(folder), "auto"), FilterSection()
    part = scan_shards(corpus, range(len(corpus.shards)), filters, lambda count: None)
    return merge_scans(corpus, [part], filters, max_quarantined=0.0, quarantine_file=None)

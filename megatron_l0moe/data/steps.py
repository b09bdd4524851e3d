"""The three heavy steps of curate as datatrove pipeline steps: scan, embed, tokenise.

Shape letters: n = documents of one unit, V = embedding dimension.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_l0moe.data.catalog import ROW, Catalog, ScanPart, read_documents, scan_shards
from megatron_l0moe.data.corpus import Corpus
from megatron_l0moe.data.engine.step import UnitStep
from megatron_l0moe.data.engine.units import Plan
from megatron_l0moe.data.engine.workspace import Workspace
from megatron_l0moe.data.quarantine import Quarantine
from megatron_l0moe.recipe.sections import DataSection, FilterSection

LENGTHS = np.dtype([("id", "<i8"), ("length", "<i4")])
"""A tokenised document: its catalog number, and its tokens with EOD."""


class ScanStep(UnitStep):
    """Reads shards and keeps a row for each document that is used; an item of the plan is a shard's number."""

    def __init__(self, workspace: Workspace, corpus: Corpus, filters: FilterSection) -> None:
        super().__init__("scan", workspace, workspace.work / "scan")
        self.corpus = corpus.record()
        self.filters = filters

    def files_of(self, plan: Plan, unit: int) -> tuple[Path, ...]:
        """Return the file of rows."""
        return (self.folder / f"{unit:05d}.npy",)

    def do_unit(self, plan: Plan, unit: int, files: tuple[Path, ...]) -> dict[str, Any]:
        """Scan the unit's shards."""
        corpus = Corpus.from_record(self.corpus)
        part = scan_shards(corpus, plan.items_of(unit).tolist(), self.filters, self.advance)
        _save(files[0], part.rows)
        return {"domains": part.domains, "dropped": part.dropped, "quarantine": part.quarantine.record()}

    def part(self, unit: int, content: dict[str, Any]) -> ScanPart:
        """Return what a unit found; ``content`` is that of its record."""
        rows = np.load(self.folder / f"{unit:05d}.npy", mmap_mode="r")
        assert rows.dtype == ROW, f"rows of another version in {self.folder}"
        quarantine = Quarantine.from_record(content["quarantine"])
        return ScanPart(rows, content["domains"], content["dropped"], quarantine)


class EmbedStep(UnitStep):
    """Writes the vectors of documents, float16 [n, V], in the order of their numbers."""

    def __init__(self, workspace: Workspace, catalog: Path, model: Path, data: DataSection) -> None:
        super().__init__("embed", workspace, workspace.work / "embed")
        self.catalog = catalog
        self.model = str(model.resolve())
        self.max_tokens = data.embedding_max_tokens
        self.batch_size = data.embedding_batch_size

    def files_of(self, plan: Plan, unit: int) -> tuple[Path, ...]:
        """Return the file of vectors and that of their documents' numbers."""
        return self.folder / f"{unit:05d}.npy", self.folder / f"{unit:05d}.ids.npy"

    def do_unit(self, plan: Plan, unit: int, files: tuple[Path, ...]) -> dict[str, Any]:
        """Embed the unit's documents; memory for a chunk of them, not for the unit."""
        ids = plan.items_of(unit)
        heads = (d.text[: self._encoder.head_chars] for _, d in read_documents(self._catalog, ids))
        vectors, start = None, 0
        for chunk in self._encoder.embed_chunks(heads, self.advance):
            if vectors is None:
                shape = (len(ids), chunk.shape[1])
                vectors = np.lib.format.open_memmap(files[0], mode="w+", dtype=np.float16, shape=shape)
            vectors[start : start + len(chunk)] = chunk
            start += len(chunk)
        assert vectors is not None, "a unit has documents"
        assert start == len(ids), f"{start} vectors for {len(ids)} documents"
        vectors.flush()
        _save(files[1], ids)
        return {"documents": len(ids), "dimension": vectors.shape[1]}

    @cached_property
    def _catalog(self) -> Catalog:
        return Catalog.load(self.catalog)

    @cached_property
    def _encoder(self) -> Any:
        """Load the encoder once for all units of a task."""
        import torch

        from megatron_l0moe.data.embedding import load_encoder  # seconds to import: only where it is used

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return load_encoder(self.model, max_tokens=self.max_tokens, batch_size=self.batch_size)


class TokeniseStep(UnitStep):
    """Writes documents as Megatron's .bin and .idx, a shard for each unit, and their lengths."""

    def __init__(self, workspace: Workspace, catalog: Path, model: str, eod: int | None, number: int) -> None:
        super().__init__("tokenise", workspace, workspace.work / "tokenise" / f"round_{number:03d}")
        self.catalog = catalog
        self.model = str(Path(model).resolve())
        self.eod = eod

    def files_of(self, plan: Plan, unit: int) -> tuple[Path, ...]:
        """Return the shard's pair, which lies where it stays, and the file of lengths."""
        iteration, shard = int(plan.units["iteration"][unit]), int(plan.units["shard"][unit])
        prefix = self.workspace.out / shard_path(iteration, shard)
        return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), self.folder / f"{unit:05d}.npy"

    def do_unit(self, plan: Plan, unit: int, files: tuple[Path, ...]) -> dict[str, Any]:
        """Tokenise the unit's documents, each up to the plan's limit."""
        from megatron_l0moe.index.tokens import write_documents

        limit = int(plan.units["limit"][unit])
        texts = ((i, d.text, limit) for i, d in read_documents(self._catalog, plan.items_of(unit)))
        written = write_documents(files[0].with_suffix(""), texts, self._tokenizer, self.advance)
        _save(files[2], np.array(written, dtype=LENGTHS))
        return {"documents": len(written), "tokens": sum(length for _, length in written)}

    @cached_property
    def _catalog(self) -> Catalog:
        return Catalog.load(self.catalog)

    @cached_property
    def _tokenizer(self) -> Any:
        from megatron_l0moe.index.tokens import CorpusTokenizer

        return CorpusTokenizer.load(Path(self.model), eod=self.eod)


def shard_path(iteration: int, shard: int) -> str:
    """Return the place of a shard of tokens in the stage's folder, without suffix."""
    return f"iter_{iteration:03d}/shard_{shard:05d}"


def _save(file: Path, array: Any) -> None:
    with file.open("wb") as stream:  # np.save would add .npy to another name
        np.save(stream, array)

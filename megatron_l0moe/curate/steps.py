"""The three heavy steps of curate, scan, embed, tokenise: as datatrove pipeline steps, and the driver's side of each.

The driver cuts a step into units, has them done, and reads what was made. What is cut where depends on the corpus and
the settings only, never on tasks, workers or executor.

Shape letters: n = documents of one unit, N = documents, Q = iterations, V = embedding dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_l0moe.curate.corpus.catalog import (
    ROW,
    Catalog,
    ScanPart,
    merge_scans,
    read_documents,
    scan_shards,
)
from megatron_l0moe.curate.corpus.lines import Quarantine
from megatron_l0moe.curate.corpus.shard_files import Corpus
from megatron_l0moe.curate.embedding import VectorShards, find_model
from megatron_l0moe.curate.sampling import WRITTEN, ClusterFiller
from megatron_l0moe.curate.tasks.run import run_step
from megatron_l0moe.curate.tasks.step import UnitStep
from megatron_l0moe.curate.tasks.units import UnitPlan, UnitRecord, Workspace, cut_at_shards
from megatron_l0moe.index.index import Shard
from megatron_l0moe.recipe.sections import DataSection, FilterSection

LENGTHS = np.dtype([("id", "<i8"), ("length", "<i4")])
"""A tokenised document: its catalog number, and its tokens with EOD."""


class ScanStep(UnitStep):
    """Reads shards and keeps a row for each document that is used; an item of the plan is a shard's number."""

    def __init__(self, workspace: Workspace, corpus: Corpus, filters: FilterSection) -> None:
        super().__init__("scan", workspace, workspace.work / "scan")
        self.corpus = corpus.record()
        self.filters = filters

    def files_of(self, plan: UnitPlan, unit: int) -> tuple[Path, ...]:
        """Return the file of rows."""
        return (self.folder / f"{unit:05d}.npy",)

    def do_unit(self, plan: UnitPlan, unit: int, files: tuple[Path, ...]) -> dict[str, Any]:
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

    def files_of(self, plan: UnitPlan, unit: int) -> tuple[Path, ...]:
        """Return the file of vectors and that of their documents' numbers."""
        return self.folder / f"{unit:05d}.npy", self.folder / f"{unit:05d}.ids.npy"

    def do_unit(self, plan: UnitPlan, unit: int, files: tuple[Path, ...]) -> dict[str, Any]:
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

        from megatron_l0moe.curate.embedding import load_encoder  # seconds to import: only where it is used

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

    def files_of(self, plan: UnitPlan, unit: int) -> tuple[Path, ...]:
        """Return the shard's pair, which lies where it stays, and the file of lengths."""
        iteration, shard = int(plan.units["iteration"][unit]), int(plan.units["shard"][unit])
        prefix = self.workspace.out / shard_path(iteration, shard)
        return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), self.folder / f"{unit:05d}.npy"

    def do_unit(self, plan: UnitPlan, unit: int, files: tuple[Path, ...]) -> dict[str, Any]:
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


SCAN_BYTES = 64e6
"""Bytes on disk of the shards that one unit scans."""
EMBED_DOCUMENTS = 2048
"""Documents that one unit embeds, rounded up to whole shards: a chunk of the encoder."""
TOKENISE_TOKENS = 64e6
"""Tokens by the estimate that one unit writes, so that 30 billion are some hundred shards."""

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Embedded:
    """Vectors of documents, on disk."""

    ids: Ids
    """[N], ascending: the document of each row."""
    files: list[Path]
    """float16 [n, V] each, one after the other."""

    def of(self, ids: Ids) -> VectorShards:
        """Return the vectors of some documents, in their order; they are read when they are asked for."""
        return VectorShards(self.files, np.searchsorted(self.ids, ids))


def scan(workspace: Workspace, corpus: Corpus, data: DataSection, quarantine_file: Path) -> Catalog:
    """Scan the corpus and save its catalog for the other steps."""
    sizes = np.array([int(size) for _, size, _ in corpus.state()], dtype=np.float64)
    shards = np.arange(len(corpus.shards))
    plan = UnitPlan.of(shards, cut_at_shards(shards, sizes, SCAN_BYTES))
    step = ScanStep(workspace, corpus, data.filters)
    records = run_step(step, plan, data.executor, what="scanned documents", count_items=False)
    catalog = merge_scans(
        corpus,
        [step.part(unit, record.content) for unit, record in enumerate(records)],
        data.filters,
        max_quarantined=data.max_quarantined,
        quarantine_file=quarantine_file,
    )
    catalog.save(workspace.work / "catalog")
    return catalog


def embed(workspace: Workspace, catalog: Catalog, ids: Ids, data: DataSection) -> Embedded:
    """Embed documents."""
    wanted = np.sort(ids)
    ends = cut_at_shards(catalog.rows["shard"][wanted], np.ones(len(wanted)), EMBED_DOCUMENTS)
    model = find_model(data.embedding_model)
    step = EmbedStep(workspace, workspace.work / "catalog", model, data)
    plan = UnitPlan.of(wanted, ends)
    run_step(step, plan, data.executor, what="embedded documents", takes_gpu=True)
    return Embedded(wanted, [step.files_of(plan, unit)[0] for unit in range(len(plan))])


class Tokeniser:
    """Writes the documents that clusters ask for, round by round, into the shards of their iterations."""

    def __init__(
        self,
        workspace: Workspace,
        catalog: Catalog,
        estimate: Floats,
        data: DataSection,
        *,
        model: str,
    ) -> None:
        self._workspace = workspace
        self._catalog = catalog
        self._estimate = estimate
        self._model = model
        self._data = data
        self._round = 0
        self.shards: dict[int, list[Shard]] = {}
        """The shards of each iteration, in their order."""

    def write(self, fillers: Sequence[ClusterFiller], chosen: Sequence[Ids]) -> list[npt.NDArray[np.void]]:
        """Tokenise the chosen documents of each iteration; return for each an array of ``WRITTEN``, by id."""
        plans = [self._plan(filler, ids) for filler, ids in zip(fillers, chosen, strict=True)]
        plan = UnitPlan.joined(plans)
        catalog = self._workspace.work / "catalog"
        step = TokeniseStep(self._workspace, catalog, self._model, self._data.eod, self._round)
        self._round += 1
        records = run_step(step, plan, self._data.executor, what="tokenised documents")
        parts: dict[int, list[npt.NDArray[np.void]]] = {f.budget.iteration: [] for f in fillers}
        for unit, record in enumerate(records):
            iteration = int(plan.units["iteration"][unit])
            self.shards.setdefault(iteration, []).append(_shard(step, plan, unit, record))
            parts[iteration].append(_written(step, plan, unit))
        return [np.concatenate([np.empty(0, WRITTEN), *parts[f.budget.iteration]]) for f in fillers]

    def _plan(self, filler: ClusterFiller, chosen: Ids) -> UnitPlan:
        ids, budget = np.sort(chosen), filler.budget
        weights = np.minimum(self._estimate[ids], budget.tokens)
        return UnitPlan.of(
            ids,
            cut_at_shards(self._catalog.rows["shard"][ids], weights, TOKENISE_TOKENS),
            iteration=budget.iteration,
            first_shard=len(self.shards.get(budget.iteration, [])),
            limit=budget.tokens,
        )


def _shard(step: TokeniseStep, plan: UnitPlan, unit: int, record: UnitRecord) -> Shard:
    path = shard_path(int(plan.units["iteration"][unit]), int(plan.units["shard"][unit]))
    return Shard(
        path=path,
        bin_sha256=record.files[f"{path}.bin"][1],
        idx_sha256=record.files[f"{path}.idx"][1],
        documents=record.content["documents"],
        tokens=record.content["tokens"],
    )


def _written(step: TokeniseStep, plan: UnitPlan, unit: int) -> npt.NDArray[np.void]:
    lengths = np.load(step.files_of(plan, unit)[2])
    assert np.array_equal(lengths["id"], plan.items_of(unit)), (
        "other documents than those that were asked for"
    )
    written = np.empty(len(lengths), dtype=WRITTEN)
    written["id"], written["length"] = lengths["id"], lengths["length"]
    written["shard"], written["doc"] = plan.units["shard"][unit], np.arange(len(lengths))
    return written

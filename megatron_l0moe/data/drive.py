"""The driver's side of the heavy steps: cut them into units, have them done, read what was made.

What is cut where depends on the corpus and the settings only, never on tasks, workers or executor.

Shape letters: N = documents, Q = iterations, V = embedding dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_l0moe.data.catalog import Catalog, merge_scans
from megatron_l0moe.data.corpus import Corpus
from megatron_l0moe.data.embedding import find_model
from megatron_l0moe.data.engine.run import run_step
from megatron_l0moe.data.engine.units import Plan, Record, cut_at_shards
from megatron_l0moe.data.engine.workspace import Workspace
from megatron_l0moe.data.sampling import WRITTEN, ClusterFiller
from megatron_l0moe.data.steps import EmbedStep, ScanStep, TokeniseStep, shard_path
from megatron_l0moe.data.vectors import VectorShards
from megatron_l0moe.index.index import Shard
from megatron_l0moe.recipe.sections import DataSection

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
    """Scan the corpus and save its catalog for the other steps.

    Raises:
        L0MoEError: see `merge_scans`, or a task failed.
    """
    sizes = np.array([int(size) for _, size, _ in corpus.state()], dtype=np.float64)
    shards = np.arange(len(corpus.shards))
    plan = Plan.of(shards, cut_at_shards(shards, sizes, SCAN_BYTES))
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
    """Embed documents.

    Raises:
        L0MoEError: a task failed.
    """
    wanted = np.sort(ids)
    ends = cut_at_shards(catalog.rows["shard"][wanted], np.ones(len(wanted)), EMBED_DOCUMENTS)
    model = find_model(data.embedding_model)
    step = EmbedStep(workspace, workspace.work / "catalog", model, data)
    plan = Plan.of(wanted, ends)
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
        """Of each iteration, in their order."""

    def write(self, fillers: Sequence[ClusterFiller], chosen: Sequence[Ids]) -> list[npt.NDArray[np.void]]:
        """Tokenise the chosen documents of each iteration; return for each an array of ``WRITTEN``, by id."""
        plans = [self._plan(filler, ids) for filler, ids in zip(fillers, chosen, strict=True)]
        plan = Plan.joined(plans)
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

    def _plan(self, filler: ClusterFiller, chosen: Ids) -> Plan:
        ids, budget = np.sort(chosen), filler.budget
        weights = np.minimum(self._estimate[ids], budget.tokens)
        return Plan.of(
            ids,
            cut_at_shards(self._catalog.rows["shard"][ids], weights, TOKENISE_TOKENS),
            iteration=budget.iteration,
            first_shard=len(self.shards.get(budget.iteration, [])),
            limit=budget.tokens,
        )


def _shard(step: TokeniseStep, plan: Plan, unit: int, record: Record) -> Shard:
    path = shard_path(int(plan.units["iteration"][unit]), int(plan.units["shard"][unit]))
    return Shard(
        path=path,
        bin_sha256=record.files[f"{path}.bin"][1],
        idx_sha256=record.files[f"{path}.idx"][1],
        documents=record.content["documents"],
        tokens=record.content["tokens"],
    )


def _written(step: TokeniseStep, plan: Plan, unit: int) -> npt.NDArray[np.void]:
    lengths = np.load(step.files_of(plan, unit)[2])
    assert np.array_equal(lengths["id"], plan.items_of(unit)), (
        "other documents than those that were asked for"
    )
    written = np.empty(len(lengths), dtype=WRITTEN)
    written["id"], written["length"] = lengths["id"], lengths["length"]
    written["shard"], written["doc"] = plan.units["shard"][unit], np.arange(len(lengths))
    return written

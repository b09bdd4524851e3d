"""The curate stage: corpus in, Q x K sets of tokens with their training order out (paper section 3.1).

Shape letters: N = documents, Q = iterations, K = clusters, V = embedding dimension, S = sequence length.
"""

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_l0moe.curate.ccm import Confusion, confusion, match_centres, semantic_distance, training_order
from megatron_l0moe.curate.clustering import (
    Clustering,
    Vectors,
    nearest_centre,
    random_clusters,
    spherical_kmeans,
)
from megatron_l0moe.curate.corpus.catalog import Catalog
from megatron_l0moe.curate.corpus.shard_files import Corpus, open_corpus
from megatron_l0moe.curate.embedding import check_encoder, find_model
from megatron_l0moe.curate.heldout import HeldOut, hold_out, write_heldout
from megatron_l0moe.curate.sampling import Budget, ClusterFiller, draw_subsets, fill_clusters
from megatron_l0moe.curate.steps import Tokeniser, embed, scan
from megatron_l0moe.curate.tasks.run import session
from megatron_l0moe.curate.tasks.units import Workspace
from megatron_l0moe.errors import CorpusChangedError, L0MoEError
from megatron_l0moe.index.index import DOC, ClusterBlock, IterationBlock, Shard, write_index
from megatron_l0moe.index.tokens import CorpusTokenizer
from megatron_l0moe.recipe.recipe import Recipe
from megatron_l0moe.runs import digests
from megatron_l0moe.runs.stage_folder import write_json

logger = logging.getLogger(__name__)

Ids = npt.NDArray[np.int64]
Written = npt.NDArray[np.void]
"""[n] of `sampling.WRITTEN`: documents of one cluster."""


def curate(recipe: Recipe, out: Path) -> dict[str, object]:
    """Make the training sets of all expert runs and of MoE training, and the held-out set, in ``out``.

    The same recipe and corpus give the same bytes. Files: see docs/curate.md.

    Returns:
        The content of summary.json.

    Raises:
        L0MoEError: any problem of the corpus, the models or the sizes; see the modules of this package.
    """
    budgets, replay = plan_budgets(recipe)
    tokenizer = CorpusTokenizer.load(Path(recipe.model.path), eod=recipe.data.eod)
    check_encoder(recipe.data.embedding_model, max_tokens=recipe.data.embedding_max_tokens)
    corpus = open_corpus(recipe.data.corpus, recipe.data.corpus_format, recipe.data.domain_key)
    workspace = Workspace.begin(out, what_decides(recipe, corpus, tokenizer))
    try:
        with session(recipe.data.executor):
            return _curate(recipe, workspace, corpus, tokenizer, budgets, replay)
    except CorpusChangedError as error:
        workspace.refuse_later(error)
        raise


def _curate(
    recipe: Recipe,
    workspace: Workspace,
    corpus: Corpus,
    tokenizer: CorpusTokenizer,
    budgets: Sequence[Budget],
    replay: int,
) -> dict[str, object]:
    data, num_clusters, clock, out = recipe.data, recipe.model.num_experts, StepClock(), workspace.out
    with clock.step("scan"):
        catalog = scan(workspace, corpus, data, out / "quarantine.jsonl")
    with clock.step("hold out"):
        heldout = hold_out(
            catalog,
            tokenizer,
            tokens_per_domain=data.heldout_tokens_per_domain,
            seq_length=data.seq_length,
            seed=recipe.seed,
        )
    estimate = estimate_tokens(catalog, heldout)
    subsets = draw_iterations(catalog, heldout, estimate, budgets, num_clusters, seed=recipe.seed)
    with clock.step("embed"):
        embedded = embed(workspace, catalog, np.concatenate([*subsets, heldout.ids]), data)
    with clock.step("cluster"):
        divide = spherical_kmeans if data.clustering == "kmeans" else random_clusters
        raw = [
            divide(embedded.of(subset), num_clusters, seed=recipe.seed + n)
            for n, subset in enumerate(subsets)
        ]
        matching = [match_centres(raw[0].centres, c.centres, method=data.matching) for c in raw]
        matching[0] = np.arange(num_clusters)
        clusters = [c.relabelled(m) for c, m in zip(raw, matching, strict=True)]
        terms = [confusion(clusters[0].centres, c.centres, delta=data.delta) for c in clusters[1:]]
        distances = [semantic_distance(t.ccm, beta=data.beta) for t in terms]
        order = training_order(distances, order=data.order, seed=recipe.seed)
    with clock.step("tokenise"):
        fillers = [
            ClusterFiller(subset, c.assignment, estimate[subset], budget, num_clusters=num_clusters)
            for subset, c, budget in zip(subsets, clusters, budgets, strict=True)
        ]
        tokeniser = Tokeniser(workspace, catalog, estimate, data, model=recipe.model.path)
        fill_clusters(fillers, tokeniser.write)
        chosen = [filler.clusters for filler in fillers]
    with clock.step("index"):
        shards = [tokeniser.shards[number] for number in range(data.iterations)]
        write_indexes(recipe, out, tokenizer, shards, chosen, budgets, replay, order, distances)
        for shard in itertools.chain(*shards):
            digests.remember(out / f"{shard.path}.bin", shard.bin_sha256)
            digests.remember(out / f"{shard.path}.idx", shard.idx_sha256)
        first = nearest_of_first_documents(heldout, embedded.of(heldout.ids), clusters[0])
        write_heldout(out / "heldout.jsonl", heldout.sequences, first, catalog.domains)
    write_clusters(out / "clusters.npz", clusters)
    write_json(out / "ccm.json", describe_ccm(recipe, terms, distances, order, matching[1:]))
    summary = summarise(catalog, heldout, subsets, clusters, chosen, budgets)
    summary |= {"order": order, "d_ds": distances, "model": recipe.model.path, "seconds": clock.seconds}
    write_json(out / "summary.json", summary)
    return summary


def what_decides(recipe: Recipe, corpus: Corpus, tokenizer: CorpusTokenizer) -> dict[str, object]:
    """Return everything that the result depends on, for finding out whether unfinished work can be used."""
    encoder = find_model(recipe.data.embedding_model)
    files = sorted(path for path in encoder.rglob("*") if path.is_file())
    return {
        "seed": recipe.seed,
        "num_experts": recipe.model.num_experts,
        "data": recipe.data.model_dump(exclude={"executor"}),
        "expert_batch": recipe.expert_training.global_batch_size,
        "sequences_per_domain": recipe.moe_training.sequences_per_domain,
        "tokenizer": [tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod],
        "encoder": [
            [path.relative_to(encoder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns]
            for path in files
        ],
        "corpus": [corpus.format, corpus.state()],
    }


def plan_budgets(recipe: Recipe) -> tuple[list[Budget], int]:
    """Return each iteration's budget and the sequences of each cluster of D^(0) that MoE training replays.

    Everything is cut to whole global batches: of an expert run for iteration 0, of p * K sequences otherwise.
    """
    data, k, p = recipe.data, recipe.model.num_experts, recipe.moe_training.sequences_per_domain
    batch_tokens = recipe.moe_global_batch_size * data.seq_length
    expert = recipe.expert_steps * recipe.expert_training.global_batch_size
    later = data.tokens_per_set // batch_tokens * p
    replay = data.include_initial_tokens // batch_tokens * p
    if replay > expert:
        raise L0MoEError(
            f"data.include_initial_tokens ({data.include_initial_tokens}) is more than D^(0) holds; set it to at most "
            f"the tokens of the {k} expert runs ({expert * k * data.seq_length})."
        )
    budgets = [Budget(0, expert, data.seq_length, "data.tokens_per_expert", 1)]
    budgets += [
        Budget(number, later, data.seq_length, "data.tokens_per_set", k)
        for number in range(1, data.iterations)
    ]
    return budgets, replay


def estimate_tokens(catalog: Catalog, heldout: HeldOut) -> npt.NDArray[np.float64]:
    """Return the estimated tokens of every document, float64 [N], with EOD."""
    density = heldout.tokens_per_char[catalog.rows["domain"]]
    return np.asarray(catalog.rows["chars"] * density + 1.0, dtype=np.float64)


def draw_iterations(
    catalog: Catalog,
    heldout: HeldOut,
    estimate: npt.NDArray[np.float64],
    budgets: Sequence[Budget],
    num_clusters: int,
    *,
    seed: int,
) -> list[Ids]:
    """Return Q disjoint random subsets of the documents that are not held out."""
    ids = np.setdiff1d(np.arange(len(catalog)), heldout.ids)
    # No document gives a cluster more than its budget, however long it is.
    usable = np.minimum(estimate[ids], max(budget.tokens for budget in budgets))
    return draw_subsets(ids, usable, [num_clusters * budget.tokens for budget in budgets], seed=seed)


def nearest_of_first_documents(heldout: HeldOut, vectors: Vectors, clustering: Clustering) -> list[int]:
    """Return for each held-out sequence the cluster of its first document; ``vectors`` follow ``heldout.ids``."""
    cluster_of = dict(
        zip(heldout.ids.tolist(), nearest_centre(vectors, clustering.centres).tolist(), strict=True)
    )
    return [cluster_of[sequence.first_document] for sequence in heldout.sequences]


def write_indexes(
    recipe: Recipe,
    out: Path,
    tokenizer: CorpusTokenizer,
    shards: Sequence[list[Shard]],
    chosen: Sequence[Sequence[Written]],
    budgets: Sequence[Budget],
    replay: int,
    order: Sequence[int],
    distances: Sequence[float],
) -> None:
    """Write expert_000 .. expert_(K-1) and moe."""
    common: dict[str, Any] = {
        "num_domains": recipe.model.num_experts,
        "iterations": recipe.data.iterations,
        "seq_length": recipe.data.seq_length,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
    }
    blocks = [[_block(k, documents) for k, documents in enumerate(clusters)] for clusters in chosen]
    for k, block in enumerate(blocks[0]):
        write_index(
            out / f"expert_{k:03d}",
            [IterationBlock(0, shards[0], [block], budgets[0].sequences)],
            kind="expert",
            d_ds=[],
            sequences_per_domain=recipe.expert_training.global_batch_size,
            rotate=False,
            **common,
        )
    moe = [
        IterationBlock(n, shards[n], blocks[n], budgets[n].sequences) for n in order
    ] * recipe.data.set_passes
    if replay:
        moe.insert(0, IterationBlock(0, shards[0], blocks[0], replay))
    write_index(
        out / "moe",
        moe,
        kind="moe",
        d_ds=list(distances),
        sequences_per_domain=recipe.moe_training.sequences_per_domain,
        rotate=recipe.data.rotates,
        shuffle_seed=recipe.seed if recipe.data.batches == "random" else None,
        **common,
    )


def _block(cluster: int, documents: Written) -> ClusterBlock:
    docs = np.zeros(len(documents), dtype=DOC)
    docs["shard"], docs["doc"] = documents["shard"], documents["doc"]
    return ClusterBlock(cluster, docs, documents["length"].astype(np.int64))


def write_clusters(path: Path, clusters: Sequence[Clustering]) -> None:
    """Write the centres of all iterations, float32 [Q, K, V], centre k of each matched to centre k of iteration 0."""
    partial = path.with_name(f".{path.name}")
    np.savez(partial, centres=np.stack([c.centres for c in clusters]))
    partial.replace(path)


def describe_ccm(
    recipe: Recipe,
    terms: Sequence[Confusion],
    distances: Sequence[float],
    order: Sequence[int],
    matching: Sequence[Ids],
) -> dict[str, object]:
    """Return the content of ccm.json; lists run over the iterations 1..Q-1, then over the clusters."""
    return {
        "f1": [t.f1.tolist() for t in terms],
        "f2": [t.f2.tolist() for t in terms],
        "f3": [t.f3.tolist() for t in terms],
        "ccm": [t.ccm.tolist() for t in terms],
        "d_ds": list(distances),
        "order": list(order),
        "beta": recipe.data.beta,
        "delta": recipe.data.delta,
        "clustering": recipe.data.clustering,
        "matching": recipe.data.matching,
        "ordering": recipe.data.order,
        "permutation": [m.tolist() for m in matching],
    }


def summarise(
    catalog: Catalog,
    heldout: HeldOut,
    subsets: Sequence[Ids],
    clusters: Sequence[Clustering],
    chosen: Sequence[Sequence[Written]],
    budgets: Sequence[Budget],
) -> dict[str, object]:
    """Count documents and tokens; the contingency table is over all documents of iteration 0's subset."""
    num_clusters = len(chosen[0])
    table = np.zeros((len(catalog.domains), num_clusters), dtype=np.int64)
    np.add.at(table, (catalog.rows["domain"][subsets[0]], clusters[0].assignment), 1)
    drawn = sum(len(subset) for subset in subsets)
    used = sum(len(cluster) for iteration in chosen for cluster in iteration)
    return {
        "documents": {
            "corpus": len(catalog) + sum(catalog.dropped.values()),
            "heldout": len(heldout.ids),
            "clustered": drawn,
            "training": used,
        },
        "dropped": {
            **catalog.dropped,
            "not drawn": len(catalog) - len(heldout.ids) - drawn,
            "budget of the cluster was full": drawn - used,
        },
        "documents_per_cluster": [
            np.bincount(c.assignment, minlength=num_clusters).tolist() for c in clusters
        ],
        "tokens_per_cluster": [[budget.sequences * budget.seq_length] * num_clusters for budget in budgets],
        "tokens_written": [
            [int(cluster["length"].sum(dtype=np.int64)) for cluster in iteration] for iteration in chosen
        ],
        "heldout_sequences": len(heldout.sequences),
        "domains": catalog.domains,
        "table": table.tolist(),
    }


class StepClock:
    """Wall seconds of each step, logged as the step ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time one step."""
        start = time.monotonic()
        logger.info("%s ...", name)
        yield
        self.seconds[name] = round(time.monotonic() - start, 3)
        logger.info("%s: %.1f s", name, self.seconds[name])

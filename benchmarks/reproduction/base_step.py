"""Steps `tokens` and `base`: a plain shuffled stream over all domains, and the dense base trained on it.

Of a base that was there: the held-out sequences alone, and links to its files.
"""

import math
import os
from pathlib import Path

import numpy as np
from scanned import scan_corpus
from settings import Place, PretrainedSettings, TrainingSettings

from megatron_l0moe.chain.training_commands import DenseTraining, dense_job
from megatron_l0moe.conversion.export import export_dense
from megatron_l0moe.curate.corpus.catalog import Catalog, read_documents
from megatron_l0moe.curate.heldout import hold_out, write_heldout
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.index.index import DOC, ClusterBlock, IterationBlock, Shard, write_index
from megatron_l0moe.index.tokens import CorpusTokenizer, write_documents
from megatron_l0moe.recipe.layout import Layout
from megatron_l0moe.runs.child_process import run_command
from megatron_l0moe.runs.stage_folder import sha256_file
from megatron_l0moe.sizes.architecture import Architecture

STREAM = "stream"


def make_tokens(place: Place, out: Path) -> dict[str, object]:
    """Write heldout.jsonl and, where the base is pretrained here, its index `stream`."""
    data, base = place.settings.data, place.settings.base
    tokenizer = CorpusTokenizer.load(place.base_model if place.is_pretrained else place.tokenizer_folder)
    held = scan_corpus(place.root / "corpus" / "heldout")
    split = hold_out(
        held,
        tokenizer,
        tokens_per_domain=data.heldout_tokens_per_domain,
        seq_length=data.seq_length,
        seed=base.heldout_seed if isinstance(base, PretrainedSettings) else base.training.seed,
    )
    # the cluster column: no clustering is known to the base, so it is the source domain
    write_heldout(out / "heldout.jsonl", split.sequences, [s.domain for s in split.sequences], held.domains)
    numbers: dict[str, object] = {"heldout_sequences": len(split.sequences)}
    if isinstance(base, PretrainedSettings):
        return numbers
    catalog, training = scan_corpus(place.root / "corpus" / "train"), base.training
    samples = training.steps * training.global_batch_size
    return numbers | write_stream(catalog, tokenizer, out, samples, data.seq_length, seed=training.seed)


def link_base(model: Path, out: Path) -> dict[str, object]:
    """Link the files of a Hugging Face folder into out/hf.

    Raises:
        L0MoEError: there is no such model.
    """
    if not (model / "config.json").is_file():
        raise L0MoEError(f"base.path ({model}) is no Hugging Face folder: it has no config.json; name one.")
    (out / "hf").mkdir(parents=True)
    for file in model.iterdir():
        os.symlink(file.resolve(), out / "hf" / file.name)
    return {}


def write_stream(
    catalog: Catalog, tokenizer: CorpusTokenizer, out: Path, samples: int, seq_length: int, *, seed: int
) -> dict[str, object]:
    """Write an index of one domain: all documents in a random order, again in another one as often as needed."""
    limit = int(catalog.column("chars").max()) + 1  # a token has at least one byte: nothing is cut by tokens
    everything = np.arange(len(catalog))
    texts = ((i, document.text, 4 * limit) for i, document in read_documents(catalog, everything))
    written = write_documents(out / "shard", texts, tokenizer, lambda count: None)
    lengths = np.array([length for _, length in written], dtype=np.int64)
    epochs = math.ceil((samples * seq_length + 1) / int(lengths.sum()))
    order = np.concatenate(
        [np.random.default_rng((seed, e)).permutation(len(lengths)) for e in range(epochs)]
    )
    docs = np.zeros(len(order), dtype=DOC)
    docs["doc"] = order
    digests = [sha256_file(out / name) for name in ("shard.bin", "shard.idx")]
    shard = Shard("shard", *digests, documents=len(lengths), tokens=int(lengths.sum()))
    write_index(
        out / STREAM,
        [IterationBlock(0, [shard], [ClusterBlock(0, docs, lengths[order])], samples)],
        kind="expert",  # an index of one stream of sequences, as an expert run reads
        d_ds=[],
        num_domains=1,
        iterations=1,
        seq_length=seq_length,
        sequences_per_domain=1,
        rotate=False,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
    )
    used = samples * seq_length
    return {"corpus_tokens": int(lengths.sum()), "tokens": used, "epochs": used / int(lengths.sum())}


def train_and_export(
    folder: Path,
    model: Path,
    index: Path,
    training: TrainingSettings,
    seq_length: int,
    *,
    start: Path | None = None,
) -> dict[str, object]:
    """Train a dense model with Megatron's loop, from its last checkpoint if it has one, and write folder/hf.

    Args:
        folder: takes checkpoints/, metrics.jsonl, train.log, hf/.
        model: Hugging Face folder of config and tokenizer.
        index: prefix of a sample index.
        training: steps, batches, rates.
        seq_length: of the index.
        start: Megatron checkpoint to begin with; None: random weights.
    """
    job = dense_job(
        DenseTraining(
            folder=folder,
            index=index,
            start=start,
            seq_length=seq_length,
            layout=Layout(processes=training.processes),
            **training.model_dump(exclude={"processes"}),
        ),
        Architecture.from_hf(model),
    )
    tracker = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    if not _is_at(tracker, training.steps):
        run_command(job.command, log=folder / "train.log", env=job.env)
    if not _is_at(tracker, training.steps):
        raise L0MoEError(
            f"Training in {folder} ended before step {training.steps}; run the same command to go on."
        )
    if (folder / "hf" / "config.json").is_file():  # written last
        return {}
    for file in (folder / "hf").glob("*"):
        file.unlink()
    return export_dense(folder / "checkpoints", model, folder / "hf")


def _is_at(tracker: Path, steps: int) -> bool:
    return tracker.is_file() and tracker.read_text(encoding="utf-8").strip() == str(steps)

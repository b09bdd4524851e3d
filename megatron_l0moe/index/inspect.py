"""What a curate folder holds, in tables for people, and the verification of all of it."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.index.dataset import CurriculumDataset
from megatron_l0moe.index.index import IndexHeader, load_header
from megatron_l0moe.index.tokens import TOKENIZER_FILES, open_tokenizer
from megatron_l0moe.index.verify import check_checksums, check_sizes, checksums_of
from megatron_l0moe.runs import digests
from megatron_l0moe.runs.stage_folder import MARKER, recorded_outputs, sha256_file
from megatron_l0moe.runtime.json_files import read_json

logger = logging.getLogger(__name__)

MOE = "moe"
HEAD_TOKENS = 48
HEAD_CHARS = 100


@dataclass(frozen=True)
class CurateFolder:
    """The result of the curate stage, opened."""

    path: Path
    headers: dict[str, IndexHeader]
    """The headers by the index' name: moe, expert_000, ..."""
    summary: dict[str, Any]
    """What summary.json holds; empty without it."""

    @property
    def moe(self) -> IndexHeader:
        """Header of the MoE training's index."""
        return self.headers[MOE]

    def prefix(self, name: str) -> Path:
        """Return the path of an index without its suffix."""
        return self.path / name


def open_folder(path: Path) -> CurateFolder:
    """Open a curate folder, or that of the run that ``path`` is.

    Raises:
        L0MoEError: it is none, or an index or summary.json is missing or damaged.
    """
    folder = path if (path / f"{MOE}.ccm.json").is_file() else path / "curate"
    if not (folder / f"{MOE}.ccm.json").is_file():
        raise L0MoEError(
            f"{path} is no curate folder ({MOE}.ccm.json is not there or in curate/); give runs/NAME/curate, or run "
            "the curate stage to its end."
        )
    moe = load_header(folder / MOE)
    names = [MOE, *(f"expert_{k:03d}" for k in range(moe.num_domains))]
    headers = {name: moe if name == MOE else load_header(folder / name) for name in names}
    return CurateFolder(folder, headers, _read_json(folder / "summary.json"))


def find_tokenizer(folder: CurateFolder, given: Path | None) -> Path | None:
    """Return the tokenizer file that the sets were made with: the given one, or the recipe's if it is still here."""
    model = folder.summary.get("model")
    place = given or (Path(model) if isinstance(model, str) else None)
    if place is None:
        return None
    names = [place / name for name in TOKENIZER_FILES] if place.is_dir() else [place]
    file = next((name for name in names if name.is_file()), names[0])
    fits = file.is_file() and sha256_file(file) == folder.moe.tokenizer_sha256
    if given and not fits:
        problem = "is not the tokenizer that" if file.is_file() else "does not exist, so it is not what"
        raise L0MoEError(
            f"{file} {problem} {folder.path} was made with (sha256 {folder.moe.tokenizer_sha256[:16]}...); give the "
            "tokenizer file of the recipe's model."
        )
    return file if fits else None


def describe(folder: CurateFolder, console: Console, *, tokenizer: Path | None, heads: int) -> None:
    """Print what the folder holds: sizes, sets in training order, domains, sample heads, and what was dropped."""
    moe = folder.moe
    finished = "finished" if (folder.path / MARKER).is_file() else "NOT finished: the marker is missing"
    console.print(f"{folder.path}: {finished}", markup=False, highlight=False)
    tokens = sum(header.samples for header in folder.headers.values()) * moe.seq_length
    console.print(
        f"{moe.num_domains} domains, {moe.iterations} sets, sequences of {moe.seq_length} tokens, {tokens:,} training "
        f"tokens; vocabulary {moe.vocab_size}, end of document {moe.eod}, tokenizer "
        f"{moe.tokenizer_sha256[:16]}{'' if tokenizer else ' (not here: heads are shown as ids)'}",
        highlight=False,
    )
    console.print(_settings(folder), highlight=False)
    console.print(_sets(folder))
    console.print(_domains(folder))
    if heads:
        console.print(_heads(folder, tokenizer, heads))
    if folder.summary:
        console.print(_dropped(folder))
    quarantine = folder.path / "quarantine.jsonl"
    if quarantine.is_file():
        console.print(f"Unreadable input is listed in {quarantine}.", markup=False, highlight=False)


def verify(folder: CurateFolder) -> str:
    """Check every checksum, every record's range and every batch of every index; return what was checked."""
    expected: dict[Path, str] = {}
    for name, header in folder.headers.items():
        check_sizes(folder.prefix(name), header)
        _check_alike(folder, name, header)
        for file, checksum in checksums_of(folder.prefix(name), header).items():
            if expected.setdefault(file, checksum) != checksum:
                raise L0MoEError(
                    f"The indexes of {folder.path} name different checksums for {file}; run curate again."
                )
    size = sum(file.stat().st_size for file in expected)
    logger.info("checksums of %d files, %.2f GB ...", len(expected), size / 1e9)
    check_checksums(folder.prefix(MOE), expected)
    for file, checksum in expected.items():
        digests.remember(file, checksum)
    _check_lists(folder)
    for name in folder.headers:
        CurriculumDataset(folder.prefix(name), verify=False).check_all()
    samples = sum(header.samples for header in folder.headers.values())
    batches = sum(header.samples // header.global_batch_size for header in folder.headers.values())
    return (
        f"verified: {len(folder.headers)} indexes, checksums of {len(expected)} files ({size / 1e9:.2f} GB), "
        f"{samples:,} records, {batches:,} global batches"
    )


def _check_alike(folder: CurateFolder, name: str, header: IndexHeader) -> None:
    keys = ("num_domains", "iterations", "seq_length", "tokenizer_sha256", "vocab_size", "eod")
    for key in keys:
        if getattr(header, key) != getattr(folder.moe, key):
            raise L0MoEError(
                f"{key} is {getattr(header, key)!r} in index {name} of {folder.path} and "
                f"{getattr(folder.moe, key)!r} in index moe, so they are not of one run; run curate again."
            )


def _check_lists(folder: CurateFolder) -> None:
    """Compare manifest, summary and ccm.json with what is there."""
    for file, problem in recorded_outputs(folder.path).problems():
        raise L0MoEError(f"{folder.path / file} {problem}; copy the curate folder again or run curate again.")
    order = [number for number in folder.moe.order if number]
    for name, content in (
        ("ccm.json", _read_json(folder.path / "ccm.json")),
        ("summary.json", folder.summary),
    ):
        listed = content.get("order") or [] if content else order
        passes = len(order) // max(len(listed), 1)
        if listed * passes != order:
            raise L0MoEError(
                f"{folder.path / name} says the order {content.get('order')}, but the index moe has {order}; run "
                "curate again."
            )


def _settings(folder: CurateFolder) -> str:
    """Say how clusters, order and batches were made: by the paper's method or one of its ablations."""
    moe, ccm = folder.moe, _read_json(folder.path / "ccm.json")
    batch = f"{moe.global_batch_size} sequences"
    if moe.batches == "balanced":
        batch = (
            f"{moe.sequences_per_domain} sequence(s) of each domain, {'' if moe.rotate else 'not '}rotated"
        )
    clusters, order = ccm.get("clustering", "unknown"), ccm.get("ordering", "unknown")
    order += "" if order == "random" else " d_ds"
    return f"clusters: {clusters}; order of sets: {order}; global batches: {moe.batches}, {batch}"


def _sets(folder: CurateFolder) -> Table:
    table = Table(title="sets in training order", title_justify="left")
    for column in ("set", "use", "d_ds", "documents", "tokens written", "training tokens"):
        table.add_column(column, justify="left" if column == "use" else "right")
    moe = folder.moe
    experts = sum(header.samples for name, header in folder.headers.items() if name != MOE)
    rows = [(0, "experts", experts)]
    ends = [*moe.iteration_start_samples[1:], moe.samples]
    for place, (number, start, end) in enumerate(
        zip(moe.order, moe.iteration_start_samples, ends, strict=True)
    ):
        use = f"MoE, place {place + 1}" + ("" if number else " (replay)")
        rows.append((number, use, end - start))
    written = folder.summary.get("tokens_written", [])
    for number, use, samples in rows:
        shards = _shards_of(folder, number)
        distance = f"{moe.d_ds[number - 1]:.4f}" if 0 < number <= len(moe.d_ds) else ""
        tokens = sum(written[number]) if number < len(written) else sum(shard.tokens for shard in shards)
        documents = sum(shard.documents for shard in shards)
        table.add_row(
            str(number), use, distance, f"{documents:,}", f"{tokens:,}", f"{samples * moe.seq_length:,}"
        )
    return table


def _shards_of(folder: CurateFolder, number: int) -> list[Any]:
    header = folder.moe if number else folder.headers["expert_000"]
    # a set that is gone through several times is listed as often
    shards = {shard.path: shard for shard in header.shards}.values()
    return [shard for shard in shards if Path(shard.path).parent.name == f"iter_{number:03d}"]


def _domains(folder: CurateFolder) -> Table:
    table = Table(title="domains", title_justify="left")
    for column in ("domain", "expert tokens", "MoE tokens", "clustered documents", "main sources (set 0)"):
        table.add_column(column, justify="left" if column.startswith("main") else "right")
    moe, summary = folder.moe, folder.summary
    share = moe.samples // moe.num_domains * moe.seq_length
    counts = summary.get("documents_per_cluster", [])
    for k in range(moe.num_domains):
        own = folder.headers[f"expert_{k:03d}"].samples * moe.seq_length
        documents = f"{sum(iteration[k] for iteration in counts):,}" if counts else ""
        table.add_row(str(k), f"{own:,}", f"{share:,}", documents, Text(_sources(summary, k)))
    return table


def _sources(summary: dict[str, Any], k: int) -> str:
    """Return the two commonest source domains of a cluster."""
    if not summary.get("table"):
        return ""
    column = np.array(summary["table"])[:, k]
    best = [int(row) for row in np.argsort(-column, kind="stable")[:2] if column[row]]
    return ", ".join(f"{summary['domains'][row]} {100 * column[row] / column.sum():.0f} %" for row in best)


def _heads(folder: CurateFolder, tokenizer: Path | None, heads: int) -> Table:
    """Show how the first samples of each domain in MoE training begin."""
    dataset = CurriculumDataset(folder.prefix(MOE), verify=False)
    decoder = open_tokenizer(tokenizer) if tokenizer else None
    table = Table(
        "domain", "sample", "begins with", title="first samples of each domain", title_justify="left"
    )
    first = range(min(heads * folder.moe.num_domains, len(dataset)))
    items = sorted(
        (int((item := dataset[i])["domain"]), i, item["tokens"][:HEAD_TOKENS].tolist()) for i in first
    )
    for domain, i, ids in items:
        text = decoder.decode(ids) if decoder else " ".join(str(token) for token in ids)
        table.add_row(str(domain), str(i), Text(" ".join(text.split())[:HEAD_CHARS]))
    return table


def _dropped(folder: CurateFolder) -> Table:
    table = Table(title="documents", title_justify="left")
    table.add_column("what became of them")
    table.add_column("documents", justify="right")
    counts = folder.summary.get("documents", {})
    table.add_row("in the corpus", f"{counts.get('corpus', 0):,}", end_section=True)
    for name in ("training", "heldout"):
        table.add_row(f"used: {name}", f"{counts.get(name, 0):,}")
    for reason, count in folder.summary.get("dropped", {}).items():
        table.add_row(Text(f"left out: {reason}"), f"{count:,}")
    return table


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty if the file is not there."""
    return read_json(path, "copy the curate folder again") if path.is_file() else {}

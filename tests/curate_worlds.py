"""A corpus of several shards and a recipe for it, small enough that a whole curate takes seconds."""

import hashlib
from pathlib import Path

from megatron_l0moe.recipe.recipe import Recipe

K, Q, S, P, GBS = 3, 3, 16, 2, 4
DOMAINS = ("cooking", "physics", "sailing")
SMALL_UNITS = {"SCAN_BYTES": 1500.0, "EMBED_DOCUMENTS": 9, "TOKENISE_TOKENS": 150.0}
"""Instead of those of `data.drive`, so that the small corpus makes several units of each step."""


def write_corpus(folder: Path, write_lines, topic_text, shards: int = 5) -> Path:
    for shard in range(shards):
        records = [
            {"text": topic_text(domain, seed, 40 + seed), "meta": {"source": domain}}
            for seed in range(shard * 4, shard * 4 + 4)
            for domain in DOMAINS[shard % 2 :] + DOMAINS[: shard % 2]
        ]
        records.append(records[0])  # a repetition
        suffix = "jsonl.zst" if shard % 2 else "jsonl"
        write_lines(folder / f"part{shard}.{suffix}", [*records, "broken"] if shard == 3 else records)
    return folder


def make_recipe(corpus: Path, lm: Path, encoder: Path, **data: object) -> Recipe:
    settings: dict[str, object] = {
        "corpus": str(corpus), "max_quarantined": 0.05,
        "embedding_model": str(encoder), "embedding_max_tokens": 16, "iterations": Q, "seq_length": S,
        "tokens_per_expert": 8 * S, "tokens_per_set": K * P * S * 2, "heldout_tokens_per_domain": 2 * S,
    }  # fmt: skip
    return Recipe.model_validate(
        {
            "name": "test",
            "seed": 11,
            "model": {"path": str(lm), "dense_layers": 1, "num_experts": K, "expert_ffn": 8},
            "data": settings | data,
            "expert_training": {"global_batch_size": GBS},
            "moe_training": {"sequences_per_domain": P},
        }
    )


def checksums(folder: Path) -> dict[str, str]:
    """Everything that the stage made but summary.json, which holds seconds."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "summary.json" and folder / "work" not in path.parents
    }

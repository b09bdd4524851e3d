"""The held-out sequences that the curate stage writes: curate/heldout.jsonl, one JSON object a line."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_l0moe.errors import L0MoEError


@dataclass(frozen=True)
class HeldoutSequence:
    """One packed sequence of a source domain that no training set holds."""

    tokens: tuple[int, ...]
    """S + 1 token ids: position i is the context of position i + 1."""
    domain: str
    """Source domain (`meta.source` of the corpus)."""
    cluster: int
    """Nearest cluster centre of iteration 0."""


def read_heldout(file: Path) -> list[HeldoutSequence]:
    """Read all held-out sequences, in file order.

    Raises:
        L0MoEError: the file is missing or empty, or a line is not of the form above (the line is named).
    """
    if not file.is_file():
        raise L0MoEError(f"Held-out text {file} does not exist; run the curate stage first.")
    with file.open(encoding="utf-8") as lines:
        sequences = [_parse(line, f"{file}:{number}") for number, line in enumerate(lines, 1)]
    if not sequences:
        raise L0MoEError(
            f"Held-out text {file} is empty; raise data.heldout_tokens_per_domain and run curate again."
        )
    return sequences


def _parse(line: str, where: str) -> HeldoutSequence:
    try:
        raw: Any = json.loads(line)
        tokens = tuple(raw["tokens"])
        sequence = HeldoutSequence(tokens=tokens, domain=raw["domain"], cluster=raw["cluster"])
    except (ValueError, KeyError, TypeError) as error:
        raise L0MoEError(
            f"{where} is not a held-out sequence with tokens, domain and cluster ({error!r}); run curate again."
        ) from error
    if len(tokens) < 2 or not all(isinstance(token, int) for token in tokens):
        raise L0MoEError(
            f"{where} holds {len(tokens)} tokens, at least 2 whole numbers are needed; run curate again."
        )
    return sequence

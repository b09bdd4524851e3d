"""The held-out sequences that the curate stage writes: curate/heldout.jsonl, one JSON object a line."""

from dataclasses import dataclass
from pathlib import Path

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runtime.json_files import parse_json


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
    with file.open("rb") as lines:
        sequences = [_parse(line, f"{file}:{number}") for number, line in enumerate(lines, 1)]
    if not sequences:
        raise L0MoEError(
            f"Held-out text {file} is empty; raise data.heldout_tokens_per_domain and run curate again."
        )
    return sequences


def check_vocabulary(largest: int, vocab_size: int) -> None:
    """Refuse held-out text with a token id that a model does not have."""
    if largest >= vocab_size:
        raise L0MoEError(
            f"The held-out text holds token id {largest}, the model's vocabulary ends at {vocab_size - 1}; curate and "
            "evaluate with the same tokenizer."
        )


def _parse(line: bytes, where: str) -> HeldoutSequence:
    raw = parse_json(line, where, "run curate again")
    try:
        tokens = tuple(raw["tokens"])
        sequence = HeldoutSequence(tokens=tokens, domain=raw["domain"], cluster=raw["cluster"])
    except (KeyError, TypeError) as error:
        raise L0MoEError(
            f"{where} is not a held-out sequence with tokens, domain and cluster ({error!r}); run curate again."
        ) from error
    if len(tokens) < 2 or not all(type(token) is int and token >= 0 for token in tokens):
        raise L0MoEError(
            f"{where} holds {len(tokens)} tokens, at least 2 whole numbers from 0 on are needed; run curate again."
        )
    if not isinstance(sequence.domain, str) or type(sequence.cluster) is not int:
        raise L0MoEError(
            f"{where} has a domain that is no text or a cluster that is no number; run curate again."
        )
    return sequence

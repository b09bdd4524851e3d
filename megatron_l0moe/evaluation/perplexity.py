"""Perplexity of a causal language model on the held-out sequences, per source domain and per cluster.

Legend: b sequences in a forward pass, S tokens of context, V vocabulary.
Every position counts once: perplexity of a group = exp(total negative log-likelihood / total tokens) of the
group, never a mean of perplexities. Log-softmax runs in fp32 whatever the model's dtype, sums over tokens in fp64.
"""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.evaluation.loads import DomainCounts
from megatron_l0moe.evaluation.models import load_model
from megatron_l0moe.index.heldout_file import HeldoutSequence, check_vocabulary, read_heldout

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class PerplexityTable:
    """Perplexities and the numbers of predicted tokens they rest on."""

    overall: float
    tokens: int
    per_domain: dict[str, float]
    domain_tokens: dict[str, int]
    per_cluster: dict[str, float]
    cluster_tokens: dict[str, int]

    def to_json(self) -> dict[str, object]:
        """Return the form that evaluate/perplexity.json holds for each model."""
        return {
            "overall": self.overall,
            "per_domain": self.per_domain,
            "per_cluster": self.per_cluster,
            "tokens": self.tokens,
            "domain_tokens": self.domain_tokens,
            "cluster_tokens": self.cluster_tokens,
        }


def perplexity(model_dir: Path, heldout: Path, *, dtype: str = "float32", batch: int = 4) -> PerplexityTable:
    """Measure a checkpoint folder; see :func:`measure`."""
    return measure(load_model(model_dir, dtype=dtype), read_heldout(heldout), batch=batch)


def measure(
    model: PreTrainedModel,
    sequences: Sequence[HeldoutSequence],
    *,
    batch: int = 4,
    counts: DomainCounts | None = None,
    name: str = "the model",
) -> PerplexityTable:
    """Measure a loaded model, called `name` in messages; `counts`, if given, are told the domains of every batch.

    Raises:
        L0MoEError: a token id outside the model's vocabulary, or a likelihood that is not a number.
    """
    check_vocabulary(max(max(sequence.tokens) for sequence in sequences), model.config.vocab_size)
    totals = _Totals()
    done, last = 0, time.monotonic()
    for rows in _batches(sequences, batch):
        if counts is not None:
            counts.expect([row.domain for row in rows])
        for row, nll in zip(rows, sequence_nll(model, [row.tokens for row in rows]), strict=True):
            totals.add(row, nll)
        done += len(rows)
        if time.monotonic() - last > PROGRESS_SECONDS:
            last = time.monotonic()
            logger.info("perplexity of %s: %d/%d sequences", name, done, len(sequences))
    return totals.table()


@torch.inference_mode()
def sequence_nll(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> list[float]:
    """Return the total negative log-likelihood (nats) of each row's tokens 1..S given those before; equal lengths."""
    tokens = torch.tensor([list(row) for row in rows], device=model.device)  # [b, S+1]
    logits: Tensor = model(input_ids=tokens[:, :-1], use_cache=False).logits  # [b, S, V]
    return [
        float(functional.cross_entropy(row.float(), labels, reduction="none").double().sum())
        for row, labels in zip(logits, tokens[:, 1:], strict=True)
    ]


def _batches(sequences: Sequence[HeldoutSequence], batch: int) -> Iterator[list[HeldoutSequence]]:
    """Yield up to `batch` sequences of one length; no padding, so no mask can be wrong."""
    by_length = sorted(
        sequences, key=lambda sequence: len(sequence.tokens)
    )  # stable: file order within a length
    for _, group in groupby(by_length, key=lambda sequence: len(sequence.tokens)):
        rows = list(group)
        for start in range(0, len(rows), batch):
            yield rows[start : start + batch]


class _Totals:
    """Sums of negative log-likelihood and of tokens, by domain and by cluster."""

    def __init__(self) -> None:
        self.nll: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.tokens: dict[tuple[str, str], int] = defaultdict(int)

    def add(self, row: HeldoutSequence, nll: float) -> None:
        if not math.isfinite(nll):
            raise L0MoEError(
                f"The model gives a negative log-likelihood of {nll} on a sequence of domain {row.domain!r}; "
                "its weights are broken, look at the losses of the training stages."
            )
        for group in (("all", ""), ("domain", row.domain), ("cluster", str(row.cluster))):
            self.nll[group].append(nll)
            self.tokens[group] += len(row.tokens) - 1

    def table(self) -> PerplexityTable:
        # fsum: the sum does not depend on the order of the sequences
        ppl = {group: math.exp(math.fsum(nll) / self.tokens[group]) for group, nll in self.nll.items()}
        return PerplexityTable(
            overall=ppl[("all", "")],
            tokens=self.tokens[("all", "")],
            per_domain=_only("domain", ppl),
            domain_tokens=_only("domain", self.tokens),
            per_cluster=_only("cluster", ppl),
            cluster_tokens=_only("cluster", self.tokens),
        )


def _only[Number: (int, float)](kind: str, values: dict[tuple[str, str], Number]) -> dict[str, Number]:
    names = sorted(name for group, name in values if group == kind)
    if kind == "cluster":
        names.sort(key=int)
    return {name: values[(kind, name)] for name in names}

"""Megatron's local experts with row counts that a CPU's kernels know already.

Shapes: T = routed tokens of the local experts, sorted by expert; h = hidden.
"""

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from megatron_l0moe.runtime.platform import expert_row_multiple


class PaddedExperts(SequentialMLP):
    """SequentialMLP whose experts each see a multiple of `expert_row_multiple(dtype)` rows, filled up with zeros.

    A zero row gives a zero output and no gradient, so the numbers are those of SequentialMLP. Transformer Engine's
    grouped experts take the place of this class where it can be imported.
    """

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """[T, h], [local experts], [T] -> [T, h] and the bias, as in SequentialMLP."""
        counts = tokens_per_expert.tolist()
        multiple = expert_row_multiple(permuted_local_hidden_states.dtype)
        padded = [-(-count // multiple) * multiple for count in counts]
        if padded == counts:
            unpadded: tuple[Tensor, Tensor | None] = super().forward(
                permuted_local_hidden_states, tokens_per_expert, permuted_probs
            )
            return unpadded
        rows = _rows(counts, padded).to(permuted_local_hidden_states.device)
        hidden = permuted_local_hidden_states.new_zeros((sum(padded), permuted_local_hidden_states.shape[1]))
        probs = permuted_probs.new_zeros(sum(padded))
        output, bias = super().forward(
            hidden.index_copy(0, rows, permuted_local_hidden_states),
            torch.tensor(padded, device=tokens_per_expert.device),
            probs.index_copy(0, rows, permuted_probs),
        )
        return output.index_select(0, rows), bias


def _rows(counts: list[int], padded: list[int]) -> Tensor:
    """Return the row of each token in the padded order; int64 [T]."""
    starts = [sum(padded[:expert]) for expert in range(len(padded))]
    return torch.cat(
        [torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]
    )

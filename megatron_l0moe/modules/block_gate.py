"""DSMoE's gates: which blocks of an FFN a token uses, and with which weight (Lv et al., 2025, arXiv 2502.12455).

The FFN's channels are cut into n contiguous blocks whose outputs sum to the dense FFN's (their eq. 6). Equation numbers
here are that paper's. Plain torch.

Shapes: n = blocks; leading dimensions are tokens in any arrangement.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BlockGateConfig:
    """Blocks and gates of DSMoE; the paper's values except where it gives none."""

    l0_blocks: int = 8
    """n: contiguous blocks of equal width into which each FFN is cut."""
    l0_block_threshold: float = 0.5
    """tau of eq. 7, in [0, 1): a block opens where its score is above it."""
    l0_block_sparsity_coeff: float = 1.0
    """Weight of the L1 loss of eq. 17-19; the paper has none, that is 1."""
    l0_block_init_std: float = 0.02
    """Standard deviation of the gates' random start, which the paper does not give."""
    l0_block_seed: int = 1234
    """Seed of that start, which is keyed by seed and layer and by nothing else."""

    def __post_init__(self) -> None:
        if self.l0_blocks < 2:
            raise ValueError(f"l0_blocks must be at least 2, got {self.l0_blocks}")
        if not 0 <= self.l0_block_threshold < 1:
            raise ValueError(
                f"l0_block_threshold must be at least 0 and below 1, got {self.l0_block_threshold}"
            )
        if self.l0_block_sparsity_coeff < 0:
            raise ValueError(
                f"l0_block_sparsity_coeff must be at least 0, got {self.l0_block_sparsity_coeff}"
            )
        if self.l0_block_init_std <= 0:
            raise ValueError(
                f"l0_block_init_std must be above 0, or all blocks start alike, got {self.l0_block_init_std}"
            )


class _StraightThrough(torch.autograd.Function):
    """S(x) = sg(G(x)) + x - sg(x) of eq. 10: thresholded forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, is_open: Tensor) -> Tensor:
        return torch.where(is_open, scores, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def open_blocks(scores: Tensor, threshold: float) -> Tensor:
    """Return which blocks each token uses: those with a score above the threshold; bool [..., n].

    A token that no block scores high enough for uses the one of the highest score, the first among equals: the paper
    does not say what happens then, and its factor n / #active would be a division by zero.
    """
    is_open = scores > threshold
    highest = scores.argmax(dim=-1, keepdim=True)
    return is_open.scatter(-1, highest, is_open.gather(-1, highest) | ~is_open.any(dim=-1, keepdim=True))


def block_weights(scores: Tensor, is_open: Tensor) -> Tensor:
    """Return the factor of each block's output: S(score) * n / #active of eq. 7, 8, 10 and 11; [..., n].

    Every score gets a gradient, that of an open and that of a closed block alike; a closed block's weights get none,
    because its factor is 0. The number of active blocks counts as a constant.
    """
    active = is_open.sum(dim=-1, keepdim=True)
    weights: Tensor = _StraightThrough.apply(scores, is_open)
    return weights * (scores.shape[-1] / active.to(scores.dtype))


def sparsity_loss(scores: Tensor, is_open: Tensor) -> Tensor:
    """Return one layer's L1 of its gates, the mean of G(score) over tokens and blocks (eq. 17-19); scalar.

    As printed, without the straight-through estimator: it lowers the scores of open blocks only.
    """
    return torch.where(is_open, scores, 0.0).mean()

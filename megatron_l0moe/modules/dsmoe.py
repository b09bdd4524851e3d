"""DSMoE: a token uses the blocks of an FFN's channels that its gates open (Lv et al., 2025, arXiv 2502.12455).

The FFN's channels are cut into n contiguous blocks whose outputs sum to the dense FFN's (their eq. 6; equation numbers
here are that paper's). The weights are those of the dense MLP under the dense MLP's names. Channel j belongs to block
j // (F / n), whichever rank holds it, so that blocks go with the channels in every tensor-parallel layout. In training
all blocks are computed and closed ones multiplied by 0, since a closed block's gate, too, learns from the block's
output. The equations come first, in plain torch; then Megatron's MLP.

Shapes: s = sequence (local under sequence parallelism), b = micro-batch, h = hidden, F = FFN channels, n = blocks,
p = TP size. Leading dimensions of the equations are tokens in any arrangement.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_l0moe.modules.l0_mlp import ScaledMLP
from megatron_l0moe.modules.token_gate import TokenGate
from megatron_l0moe.modules.trained_part import Metrics


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


def block_margins(scores: Tensor, threshold: float) -> Tensor:
    """Return how far each token is from opening another set of blocks, [N]; scores [N, n] of one layer."""
    margins = (scores - threshold).abs().amin(dim=-1)
    highest = scores.topk(2, dim=-1).values
    none_is_open = highest[:, 0] <= threshold
    return torch.where(none_is_open, torch.minimum(margins, highest[:, 0] - highest[:, 1]), margins)


class BlockGate(TokenGate):
    """The gates of one layer: weight [n, h]; its sums are active blocks, L1 loss, and tokens.

    Args:
        config: Megatron's transformer config.
        block_config: blocks, threshold, loss.
        layer: global index of the layer, from 0.
        gated_layers: L of eq. 17-19, the layers over which the loss is averaged.
        tp_group: tensor-parallel group that shards F.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        block_config: BlockGateConfig,
        layer: int,
        gated_layers: int,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__(
            config,
            layer=layer,
            parts=block_config.l0_blocks,
            std=block_config.l0_block_init_std,
            seed=block_config.l0_block_seed,
            counts=3,
            tp_group=tp_group,
        )
        self.block_config = block_config
        self.gated_layers = gated_layers

    def scores(self, hidden_states: Tensor) -> Tensor:
        """Return sigmoid(h Y), [s, b, h] -> [s, b, n], float32."""
        return torch.sigmoid(self.logits(hidden_states))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the blocks' factors for all tokens of the tensor-parallel group, and the loss to attach.

        Args:
            hidden_states: [s, b, h], the normalised input of the MLP.

        Returns:
            Factors [S, b, n] float32, and the scalar of `hand_out`.
        """
        scores = self.scores(hidden_states)
        is_open = open_blocks(scores, self.block_config.l0_block_threshold)
        weights, loss = block_weights(scores, is_open), sparsity_loss(scores, is_open)
        if self.is_counting:
            tokens = is_open[..., 0].numel()
            active = is_open.sum(dtype=torch.float64) / is_open.shape[-1]
            total_loss = loss.detach().double() * tokens
            self.count(torch.stack([active, total_loss, active.new_tensor(float(tokens))]))
        return self.hand_out(weights, loss * (self.block_config.l0_block_sparsity_coeff / self.gated_layers))

    @classmethod
    def metrics(cls, parts: Sequence[Self]) -> Metrics:
        """Return the fraction of open blocks and the sparsity loss by layer, means over the global batch."""
        metrics: Metrics = {"active_fraction": {}, "sparsity_loss": {}}
        for gate, (active, loss, tokens) in zip(parts, cls.summed_counts(parts), strict=True):
            metrics["active_fraction"][str(gate.layer)] = active / max(tokens, 1.0)
            metrics["sparsity_loss"][str(gate.layer)] = loss / max(tokens, 1.0)
        return metrics

    def margins(self, hidden_states: Tensor) -> Tensor | None:
        """Return how far each token is from opening another set of blocks, [s * b]."""
        scores = self.scores(hidden_states).float().flatten(0, -2)
        return block_margins(scores, self.block_config.l0_block_threshold)


class DSMoEMLP(ScaledMLP):
    """MLP whose intermediate activation [S, b, F/p] is multiplied, block by block, just before fc2."""

    _segments: Tensor

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        *,
        pg_collection: ProcessGroupCollection,
        block_config: BlockGateConfig,
        layer: int,
        gated_layers: int,
        name: str | None = None,
    ) -> None:
        super().__init__(config, submodules, pg_collection=pg_collection, name=name)
        self.block_gate = BlockGate(
            config,
            block_config=block_config,
            layer=layer,
            gated_layers=gated_layers,
            tp_group=pg_collection.tp,
        )
        segments = local_segments(
            config.ffn_hidden_size,
            block_config.l0_blocks,
            rank=pg_collection.tp.rank(),
            ranks=pg_collection.tp.size(),
        )
        # on the device once, since a copy in every forward pass would wait for it; it follows from the sizes
        index = torch.tensor(segments, device=torch.cuda.current_device())
        self.register_buffer("_segments", index, persistent=False)
        self._weights: Tensor | None = None

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] -> [s, b, h] and the bias, as in Megatron's MLP."""
        self._weights, loss = self.block_gate(hidden_states)
        output, bias = super().forward(hidden_states, per_token_scale, **kwargs)
        self._weights = None
        if self.training and torch.is_grad_enabled() and self.block_gate.block_config.l0_block_sparsity_coeff:
            output = MoEAuxLossAutoScaler.apply(output, loss)
        return output, bias

    def scale(self, activation: Tensor) -> Tensor:
        """[S, b, F/p] times the factors of its blocks."""
        assert self._weights is not None, "fc2 of a DSMoEMLP ran outside its forward"
        weights = self._weights.index_select(-1, self._segments).to(activation.dtype)
        # shape: (S, b, F/p) -> (S, b, segments, width) -> (S, b, F/p)
        segments = activation.unflatten(-1, (len(self._segments), -1))
        weighted: Tensor = segments * weights[..., None]
        return weighted.flatten(-2)


def local_segments(ffn: int, blocks: int, *, rank: int, ranks: int) -> list[int]:
    """Return the block of each equal segment of a rank's FFN channels, in their order.

    A rank holds channels [rank * F/p, (rank + 1) * F/p). Where a block's border is not a rank's border, or the other
    way round, the segments are as narrow as both need, and some have the same block.
    """
    width = math.gcd(ffn // blocks, ffn // ranks)
    first = rank * (ffn // ranks)
    return [channel // (ffn // blocks) for channel in range(first, first + ffn // ranks, width)]

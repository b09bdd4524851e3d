"""Megatron's gated MLP as DSMoE: a token uses the blocks of FFN channels that its gates open (arXiv 2502.12455).

The weights are those of the dense MLP under the dense MLP's names. Channel j belongs to block j // (F / n), whichever
rank holds it, so that blocks go with the channels in every tensor-parallel layout. In training all blocks are computed
and closed ones multiplied by 0, since a closed block's gate, too, learns from the block's output.

Shapes: s = sequence (local under sequence parallelism), b = micro-batch, h = hidden, F = FFN channels, n = blocks,
p = TP size.
"""

import math
from typing import Any

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, router_gating_linear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_l0moe.modules.block_gate import BlockGateConfig, block_weights, open_blocks, sparsity_loss
from megatron_l0moe.modules.collectives import copy_to_shards


class BlockGate(MegatronModule):
    """The gates of one layer: weight [n, h], the same on all tensor-parallel ranks; scores in float32.

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
        super().__init__(config)
        self.block_config = block_config
        self.layer = layer
        self.gated_layers = gated_layers
        self.tp_group = tp_group
        self.is_sequence_sharded = bool(config.sequence_parallel) and tp_group.size() > 1
        start = initial_weight(block_config, layer=layer, hidden=config.hidden_size)
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(start.to(device=device, dtype=config.params_dtype))
        # each rank sees its own part of the sequence: Megatron sums the gradients of so marked weights over the ranks
        setattr(self.weight, "sequence_parallel", self.is_sequence_sharded)  # noqa: B010  # Megatron reads this name
        self.begin_iteration()

    def begin_iteration(self) -> None:
        """Start the sums of a global batch: active blocks, L1 loss, and tokens of this rank; float64 [3]."""
        self.sums = torch.zeros(3, dtype=torch.float64)

    def scores(self, hidden_states: Tensor) -> Tensor:
        """Return sigmoid(h Y), [s, b, h] -> [s, b, n], float32."""
        return torch.sigmoid(router_gating_linear(hidden_states, self.weight, None, torch.float32))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the blocks' factors for all tokens of the tensor-parallel group, and the loss to attach.

        Args:
            hidden_states: [s, b, h], the normalised input of the MLP.

        Returns:
            Factors [S, b, n] float32, with S the sequence that the group's ranks hold together; and a scalar whose
            gradient, summed over the ranks where the sequence is cut, is that of the micro-batch's loss.
        """
        scores = self.scores(hidden_states)
        is_open = open_blocks(scores, self.block_config.l0_block_threshold)
        weights, loss = block_weights(scores, is_open), sparsity_loss(scores, is_open)
        if self.training and torch.is_grad_enabled():  # under recomputation a layer runs twice: count once
            self._count(is_open, loss)
        coefficient = self.block_config.l0_block_sparsity_coeff / self.gated_layers
        if self.is_sequence_sharded:
            weights = gather_from_sequence_parallel_region(weights, group=self.tp_group)
            return weights, loss * (coefficient / self.tp_group.size())
        return copy_to_shards(weights, self.tp_group), loss * coefficient

    @torch.no_grad()
    def _count(self, is_open: Tensor, loss: Tensor) -> None:
        tokens = is_open[..., 0].numel()
        active = is_open.sum(dtype=torch.float64) / is_open.shape[-1]
        seen = torch.stack([active, loss.double() * tokens, active.new_tensor(float(tokens))])
        self.sums = self.sums.to(seen.device) + seen


class DSMoEMLP(MLP):
    """MLP whose intermediate activation [S, b, F/p] is multiplied, block by block, just before fc2.

    The place is that of `L0MLP`: fc2 is linear, so a block's factor may stand before it, and gate and up share it.
    """

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
        super().__init__(
            config,
            submodules,
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=pg_collection.tp,
            name=name,
        )
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
        self.linear_fc2.register_forward_pre_hook(self._apply_gates)

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

    def _apply_gates(self, module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert self._weights is not None, "fc2 of a DSMoEMLP ran outside its forward"
        activation = args[0]
        weights = self._weights.index_select(-1, self._segments).to(activation.dtype)
        # shape: (S, b, F/p) -> (S, b, segments, width) -> (S, b, F/p)
        segments = activation.unflatten(-1, (len(self._segments), -1))
        return ((segments * weights[..., None]).flatten(-2), *args[1:])

    @classmethod
    def as_mlp_submodule(
        cls,
        submodules: MLPSubmodules,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        is_mtp_layer: bool,
        *,
        block_config: BlockGateConfig,
        layer: int,
        gated_layers: int,
        name: str | None = None,
    ) -> "DSMoEMLP":
        """Build the MLP of a TransformerLayer; the signature that core/transformer/transformer_layer.py:433 calls."""
        del is_mtp_layer
        return cls(
            config,
            submodules,
            pg_collection=pg_collection,
            block_config=block_config,
            layer=layer,
            gated_layers=gated_layers,
            name=name,
        )


def local_segments(ffn: int, blocks: int, *, rank: int, ranks: int) -> list[int]:
    """Return the block of each equal segment of a rank's FFN channels, in their order.

    A rank holds channels [rank * F/p, (rank + 1) * F/p). Where a block's border is not a rank's border, or the other
    way round, the segments are as narrow as both need, and some have the same block.
    """
    width = math.gcd(ffn // blocks, ffn // ranks)
    first = rank * (ffn // ranks)
    return [channel // (ffn // blocks) for channel in range(first, first + ffn // ranks, width)]


def initial_weight(config: BlockGateConfig, *, layer: int, hidden: int) -> Tensor:
    """Return the gates' random start, the same in every layout; float32 [n, h]."""
    key = np.random.SeedSequence([config.l0_block_seed, layer]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(key) & (2**63 - 1))
    return config.l0_block_init_std * torch.randn(config.l0_blocks, hidden, generator=generator)

"""What chooses parts of one MLP for a token: a weight that all tensor-parallel ranks hold, and float32 logits.

Shapes: s = sequence (local under sequence parallelism), S = the sequence that the tensor-parallel ranks hold together,
b = micro-batch, h = hidden, n = parts to choose from.
"""

from collections.abc import Iterator, Sequence

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, router_gating_linear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_l0moe.modules.tensor_parallel import copy_to_shards, keyed_generator, summed
from megatron_l0moe.modules.trained_part import ROUTER_GROUP, Schedule, TrainedPart


class TokenGate(MegatronModule, TrainedPart):
    """The gate of one layer: weight [n, h].

    Args:
        config: Megatron's transformer config.
        layer: global index of the layer, from 0.
        parts: n.
        std: standard deviation of the random start, which is keyed by `seed` and layer and so the same in every layout.
        seed: of the start.
        counts: how many sums of a global batch the gate keeps.
        tp_group: tensor-parallel group that shards the MLP.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        layer: int,
        parts: int,
        std: float,
        seed: int,
        counts: int,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__(config)
        self.layer = layer
        self.tp_group = tp_group
        self.is_sequence_sharded = bool(config.sequence_parallel) and tp_group.size() > 1
        start = std * torch.randn(parts, config.hidden_size, generator=keyed_generator(seed, layer))
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(start.to(device=device, dtype=config.params_dtype))
        # each rank sees its own part of the sequence: Megatron sums the gradients of so marked weights over the ranks
        setattr(self.weight, "sequence_parallel", self.is_sequence_sharded)  # noqa: B010  # Megatron reads this name
        self._counts = counts
        self.begin_iteration()

    def begin_iteration(self) -> None:
        """Start this rank's sums of a global batch: float64 [counts]."""
        self.sums = torch.zeros(self._counts, dtype=torch.float64)

    def begin_step(self, schedule: Schedule) -> None:
        """Start the sums, and let the gate's loss weigh in a micro-batch what the language model's loss weighs.

        Megatron's schedule does that for models with experts alone (core/pipeline_parallel/schedules.py:352).
        """
        self.begin_iteration()
        one = torch.ones(1, device=torch.cuda.current_device())
        loss_scale = one if self.config.grad_scale_func is None else self.config.grad_scale_func(one)
        MoEAuxLossAutoScaler.set_loss_scale(loss_scale / get_num_microbatches())

    def parameter_groups(self) -> Iterator[tuple[torch.nn.Parameter, str]]:
        """Yield the weight."""
        yield self.weight, ROUTER_GROUP

    @classmethod
    def summed_counts(cls, parts: Sequence["TokenGate"]) -> list[list[float]]:
        """Return the sums of the gates of a chunk over all ranks that hold tokens, which TP ranks may hold alike."""
        sums = torch.stack([part.sums for part in parts]).to(device=torch.cuda.current_device())
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        by_part: list[list[float]] = summed(sums, group).tolist()
        return by_part

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Return h Y, [s, b, h] -> [s, b, n], float32."""
        logits: Tensor = router_gating_linear(hidden_states, self.weight, None, torch.float32)
        return logits

    def hand_out(self, weights: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of all tokens of the tensor-parallel group, and the loss to attach on each of its ranks.

        Args:
            weights: [s, b, n], of this rank's tokens.
            loss: scalar, of this rank's tokens.

        Returns:
            Weights [S, b, n], whose gradient is summed over the ranks' shards of the MLP, and a scalar whose gradient,
            summed over the ranks where the sequence is cut, is that of the micro-batch's loss.
        """
        if self.is_sequence_sharded:
            gathered: Tensor = gather_from_sequence_parallel_region(weights, group=self.tp_group)
            return gathered, loss / self.tp_group.size()
        return copy_to_shards(weights, self.tp_group), loss

    @property
    def is_counting(self) -> bool:
        """Whether this pass goes into the sums; under recomputation a layer runs twice, and counts once."""
        return self.training and torch.is_grad_enabled()

    def count(self, seen: Tensor) -> None:
        """Add to the sums what a micro-batch saw; float64 [counts]."""
        self.sums = self.sums.to(seen.device) + seen

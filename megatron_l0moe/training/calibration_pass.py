"""The calibration pass: sequences of a domain through the dense model, with hooks on the MLPs of the MoE layers.

s = sequence, b = micro-batch, T = s b, H = hidden, F = FFN channels, f = F / p of one tensor-parallel rank.
"""

import argparse
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training import get_args
from torch import Tensor

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.experts.construction import PAIRS, ConstructionSettings
from megatron_l0moe.experts.unit_choice import Calibration, CalibrationSums
from megatron_l0moe.index.dataset import CurriculumDataset
from megatron_l0moe.modules.l0_mlp import L0MLP
from megatron_l0moe.modules.retention import GateStep, Phase
from megatron_l0moe.modules.tensor_parallel import gather_shards
from megatron_l0moe.training.arguments import JobSettings
from megatron_l0moe.training.forward_step import ForwardStep

logger = logging.getLogger(__name__)

Sample = tuple[CurriculumDataset, int]


def sequences(args: argparse.Namespace, method: ConstructionSettings, count: int) -> list[Sample]:
    """Return the first samples of the expert's domain or, for coactivation, the same share of every domain's.

    Raises:
        L0MoEError: an index is damaged, of another model, or shorter than what is asked for.
    """
    prefix = Path(args.l0_data_index)
    prefixes = [prefix]
    if PAIRS[method.method] == "patterns":
        prefixes = [prefix.with_name(f"expert_{k:03d}") for k in range(method.num_experts)]
    found: list[Sample] = []
    for k, path in enumerate(prefixes):
        dataset = CurriculumDataset(
            path,
            vocab_size=args.padded_vocab_size,
            seq_length=args.seq_length,
            # one rank, and of many domains only our own: each expert's job verifies its domain
            verify=torch.distributed.get_rank() == 0 and path == prefix,
        )
        share = count // len(prefixes) + (k < count % len(prefixes))
        if share > len(dataset):
            raise L0MoEError(
                f"The index {path} holds {len(dataset)} samples but calibration asks for {share}; lower "
                "expert_training.calibration.tokens, or curate more."
            )
        found += [(dataset, index) for index in range(share)]
    return found


class Collector:
    """Sums for every MoE layer of this rank, filled by hooks while the model runs."""

    def __init__(self, gpt: torch.nn.Module, method: ConstructionSettings) -> None:
        self._pairs = PAIRS[method.method]
        self._sums: dict[int, CalibrationSums] = {}
        self._inputs: dict[int, Tensor] = {}
        self._sizes: dict[int, Tensor] = {}
        for mlp in (module for module in gpt.modules() if isinstance(module, L0MLP)):
            gate = mlp.gate
            # open gates: the network is the dense one
            gate.step = GateStep(iteration=0, phase=Phase.OPEN, retention=1.0, penalty_scale=1.0)
            self._sums[gate.layer] = CalibrationSums(
                hidden=mlp.config.hidden_size,
                local=gate.local_width,
                width=gate.width,
                pairs=self._pairs,
                active=method.width,
                device=gate.log_alpha.device,
            )
            if self._pairs == "patterns":
                size = mlp.linear_fc2.weight.detach().float().norm(dim=0)
                self._sizes[gate.layer] = gather_shards(size, gate.tp_group)
            mlp.register_forward_pre_hook(self._keep_input)
            # after the gate's own hook, which multiplies by 1
            mlp.linear_fc2.register_forward_pre_hook(self._add_activations(mlp))

    def calibrations(self) -> Iterator[tuple[int, Calibration]]:
        """Yield (layer, calibration) over all ranks' text, and forget the layer's sums; all ranks have to."""
        data = parallel_state.get_data_parallel_group(with_context_parallel=True)
        tensor = parallel_state.get_tensor_model_parallel_group()

        def add_up(sums: Tensor) -> None:
            torch.distributed.all_reduce(sums, group=data)

        def rows(shard: Tensor) -> Tensor:
            return gather_shards(shard, tensor)

        for layer in sorted(self._sums):
            sums = self._sums.pop(layer)
            sums.reduce(add_up)
            yield layer, sums.gather(rows, layer)

    def _keep_input(self, mlp: torch.nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(mlp, L0MLP)
        hidden = args[0]
        if mlp.config.sequence_parallel:
            hidden = gather_shards(hidden, mlp.gate.tp_group)  # [s/p, b, H] -> [s, b, H]
        self._inputs[mlp.gate.layer] = hidden.reshape(-1, hidden.shape[-1])

    def _add_activations(self, mlp: L0MLP) -> Any:
        gate = mlp.gate

        def add(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            own = args[0].reshape(-1, gate.local_width)
            full = own
            if self._pairs != "none" and gate.tp_group.size() > 1:
                full = gather_shards(own.T.contiguous(), gate.tp_group).T  # [T, f] -> [T, F]
            self._sums[gate.layer].add(
                self._inputs.pop(gate.layer),
                own,
                full,
                self._sizes.get(gate.layer),
                first=gate.tp_group.rank() * gate.local_width,
            )

        return add


@torch.no_grad()
def run_pass(gpt: Any, settings: JobSettings, samples: Sequence[Sample], *, chunk: int) -> float:
    """Send all samples through the model, one a micro-batch, shared out over the data-parallel ranks.

    Returns:
        The dense model's mean loss in nats a token, on all ranks.
    """
    args = get_args()
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    mine = samples[rank::ranks]
    schedule = get_forward_backward_func()
    total = torch.zeros(2, dtype=torch.float64, device=next(gpt.parameters()).device)
    for first in range(0, len(mine), chunk):
        part = mine[first : first + chunk]
        results = schedule(
            forward_step_func=ForwardStep(settings),
            data_iterator=_batches(part),
            model=[gpt],
            num_microbatches=len(part),
            seq_length=args.seq_length,
            micro_batch_size=1,
            forward_only=True,
        )
        for result in results:
            total += result["lm loss"]
        logger.info("calibration: %d of %d sequences", first + len(part), len(mine))
    # tensor-parallel ranks count the same tokens twice, in both sums; only last pipeline stages know a loss
    torch.distributed.all_reduce(total)
    return float(total[0] / total[1])


def is_first_of_stage() -> bool:
    """Whether this rank constructs the layers of its pipeline stage."""
    tensor, data = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return bool(tensor == 0 and data == 0)


def _batches(samples: Sequence[Sample]) -> Iterator[dict[str, Tensor]]:
    for dataset, index in samples:
        yield {name: tensor[None] for name, tensor in dataset[index].items()}

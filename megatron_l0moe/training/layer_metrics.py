"""What the gates and routers of all layers say about a step, the same numbers on every rank of the last stage.

Shapes: L = MoE layers of a model chunk, D = domains, K = experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from torch import Tensor

from megatron_l0moe.modules.mixture_of_masks import MaskGate
from megatron_l0moe.modules.router import L0Router
from megatron_l0moe.training.model import block_gates, gates, mask_routers, routers

Metrics = dict[str, Any]
DIGITS = 5
"""Of the load by domain, K * K numbers in each record."""


def layer_metrics(chunks: Sequence[torch.nn.Module]) -> Metrics:
    """Return the metrics of all layers, whichever pipeline stage holds them; all ranks have to call this."""
    local = [
        metrics
        for chunk in chunks
        for metrics in (_of_gates(chunk), _of_routers(chunk), _of_block_gates(chunk), _of_mask_routers(chunk))
    ]
    return _merged(_gather_over_pipeline(local))


def _of_gates(chunk: torch.nn.Module) -> Metrics:
    metrics: Metrics = {}
    for gate in gates(chunk):
        layer = str(gate.layer)
        metrics["retention_target"] = gate.step.retention
        metrics["frozen"] = gate.is_frozen
        metrics.setdefault("retention", {})[layer] = gate.expected_retention()
        if isinstance(gate, MaskGate):
            metrics.setdefault("load", {})[layer] = gate.mask_load.tolist()
        if not gate.controller.uses_budget:
            lambda_1, lambda_2 = gate.controller.lambdas.tolist()
            metrics.setdefault("lambda1", {})[layer] = lambda_1
            metrics.setdefault("lambda2", {})[layer] = lambda_2
    return metrics


def _of_routers(chunk: torch.nn.Module) -> Metrics:
    found = list(routers(chunk))
    if not found:
        return {}
    layers = [str(router.layer_number - 1) for router in found]
    counts = torch.stack([router.expert_load.counts for router in found])
    load = counts / counts.sum(dim=-1, keepdim=True).clamp_min(1)
    metrics: Metrics = {"load": dict(zip(layers, load.tolist(), strict=True))}
    for name, means in _mean_losses(found).items():
        metrics[name] = dict(zip(layers, means, strict=True))
    by_domain = _load_by_domain(found)
    if by_domain is not None:
        metrics["domain_load"] = {layers[0]: by_domain.sum(dim=0).tolist()}  # of this chunk's layers together
        if by_domain.shape[1] == by_domain.shape[2]:
            own = by_domain.diagonal(dim1=1, dim2=2).mean(dim=1)
            metrics["own_expert"] = dict(zip(layers, own.tolist(), strict=True))
    return metrics


def _of_block_gates(chunk: torch.nn.Module) -> Metrics:
    """Return what DSMoE's gates opened; without sequence parallelism TP ranks count the same tokens."""
    found = list(block_gates(chunk))
    if not found:
        return {}
    sums = torch.stack([gate.sums for gate in found]).to(device=torch.cuda.current_device())
    _summed(sums, parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
    metrics: Metrics = {"active_fraction": {}, "sparsity_loss": {}}
    for gate, (active, loss, tokens) in zip(found, sums.tolist(), strict=True):
        metrics["active_fraction"][str(gate.layer)] = active / max(tokens, 1.0)
        metrics["sparsity_loss"][str(gate.layer)] = loss / max(tokens, 1.0)
    return metrics


def _of_mask_routers(chunk: torch.nn.Module) -> Metrics:
    found = list(mask_routers(chunk))
    if not found:
        return {}
    sums = torch.stack([router.sums for router in found]).to(device=torch.cuda.current_device())
    _summed(sums, parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
    means = [loss / max(micro_batches, 1.0) for loss, micro_batches in sums.tolist()]
    return {"balance_loss": dict(zip([str(router.layer) for router in found], means, strict=True))}


def _mean_losses(found: list[L0Router]) -> dict[str, list[float]]:
    """Return each loss by layer, the mean over all tokens of the global batch."""
    names = sorted(found[0].loss_sums)
    if not names:
        return {}
    sums = torch.stack([torch.stack([router.loss_sums[name] for router in found]) for name in names])
    means = _summed(sums, found[0].expert_load.group) / (
        found[0].expert_load.group.size() * get_num_microbatches()
    )
    return dict(zip(names, means.tolist(), strict=True))


def _load_by_domain(found: list[L0Router]) -> Tensor | None:
    """Return the fraction of a domain's routed tokens that each expert took, [L, D, K]; None if not counted."""
    counts = [router.domain_load.counts for router in found if router.domain_load.counts is not None]
    if not counts:
        return None
    total = _summed(torch.stack(counts), found[0].expert_load.group)
    return total / total.sum(dim=-1, keepdim=True).clamp_min(1)


def _summed(values: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Sum in place over the ranks that hold tokens of the global batch for some layers."""
    if group.size() > 1:
        torch.distributed.all_reduce(values, group=group)
    return values


def _gather_over_pipeline(local: list[Metrics]) -> list[Metrics]:
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return local
    gathered: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(gathered, local, group=group)
    return [metrics for stage in gathered for metrics in stage]


def _merged(parts: list[Metrics]) -> Metrics:
    """Put the layers together; losses and the load by domain become means over them."""
    merged: Metrics = {}
    for metrics in parts:
        for name, value in metrics.items():
            if isinstance(value, dict):
                merged.setdefault(name, {}).update(value)
            else:
                merged[name] = value
    for name in ("balance_loss", "z_loss"):
        if name in merged:
            merged[name] = sum(merged[name].values()) / len(merged[name])
    if "domain_load" in merged:
        sums = torch.tensor(list(merged["domain_load"].values()), dtype=torch.float64).sum(dim=0)
        mean = (sums / len(merged["load"])).tolist()
        merged["domain_load"] = [[round(x, DIGITS) for x in row] for row in mean]
    return merged

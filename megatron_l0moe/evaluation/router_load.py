"""Router load: which share of the top-k assignments each expert gets, per MoE layer and source domain.

transformers' Ernie4_5_MoeTopKRouter returns (logits [b*S, K], weights [b*S, k], selected experts [b*S, k]).

Legend: b sequences in a forward pass, S tokens of each, k experts per token, K experts.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.evaluation.module_hooks import DomainCounts, ModuleHooks


class RouterLoad(DomainCounts):
    """Counts the assignments of each source domain to each expert.

    Raises:
        L0MoEError: no layer has a top-k router.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(moe_routers(model))

    def whole(self, domain: str, count: Tensor) -> float:
        """Return all assignments: the shares sum to 1."""
        return float(count.sum())

    def saw(self, layer: int, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """Count what a router chose."""
        logits, _, selected = output
        rows = selected.reshape(len(self.domains), -1)  # [b, S*k]
        for domain, row in zip(self.domains, rows, strict=True):
            self.add(layer, domain, torch.bincount(row, minlength=logits.shape[-1]))


def moe_routers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Return {layer number: router module} of an Ernie4.5-MoE model.

    Raises:
        L0MoEError: no layer has a top-k router.
    """
    routers: dict[int, nn.Module] = {}
    for number, layer in enumerate(model.get_decoder().layers):
        gate = getattr(layer.mlp, "gate", None)
        if gate is not None and hasattr(layer.mlp, "experts"):
            routers[number] = gate
    if not routers:
        raise L0MoEError(f"{type(model).__name__} has no MoE layer with a router; give an exported L0-MoE.")
    return routers


class DistinctExperts(ModuleHooks):
    """Counts the different experts that each forward pass uses in each MoE layer.

    Args:
        model: an L0-MoE.
        ignore_passes: passes at the start that do not count, such as the prefill before decoding.
    """

    def __init__(self, model: PreTrainedModel, *, ignore_passes: int = 0) -> None:
        super().__init__(moe_routers(model))
        self._ignored = ignore_passes * len(self.modules)
        self._counts: list[int] = []

    def mean(self) -> float:
        """Return the mean over passes and layers."""
        counted = self._counts[self._ignored :]
        assert counted, "no pass was counted"
        return sum(counted) / len(counted)

    def saw(self, layer: int, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """Count the experts of a pass."""
        self._counts.append(int(output[2].unique().numel()))

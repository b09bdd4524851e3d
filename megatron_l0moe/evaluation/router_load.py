"""Router load: which share of the top-k assignments each expert gets, per MoE layer and source domain.

Legend: b sequences in a forward pass, S tokens of each, k experts per token, K experts.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from megatron_l0moe.errors import L0MoEError


class _RouterHooks:
    """Forward hooks on the top-k router of every MoE layer, while it is open."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._routers = moe_routers(model)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        self._handles = [
            router.register_forward_hook(self._hook(layer)) for layer, router in self._routers.items()
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, layer: int) -> Any:
        """Return the hook of one layer."""
        raise NotImplementedError


class RouterLoad(_RouterHooks):
    """Counts the assignments of each source domain to each expert.

    transformers' Ernie4_5_MoeTopKRouter returns (logits [b*S, K], weights [b*S, k], selected experts [b*S, k]).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._domains: Sequence[str] = ()
        self._counts: dict[int, dict[str, Tensor]] = {layer: {} for layer in self._routers}

    def expect(self, domains: Sequence[str]) -> None:
        """Name the source domain of each sequence of the next forward pass."""
        self._domains = domains

    def fractions(self) -> dict[int, dict[str, list[float]]]:
        """Return {MoE layer: {domain: [K fractions that sum to 1]}}."""
        return {
            layer: {domain: (n / n.sum()).tolist() for domain, n in sorted(counts.items())}
            for layer, counts in self._counts.items()
        }

    def _hook(self, layer: int) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
            logits, _, selected = output
            num_experts = logits.shape[-1]
            rows = selected.reshape(len(self._domains), -1)  # [b, S*k]
            for domain, row in zip(self._domains, rows, strict=True):
                n = torch.bincount(row, minlength=num_experts).double().cpu()
                self._counts[layer][domain] = self._counts[layer].get(domain, torch.zeros_like(n)) + n

        return count


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


class DistinctExperts(_RouterHooks):
    """Counts the different experts that each forward pass uses in each MoE layer.

    Args:
        model: an L0-MoE.
        ignore_passes: passes at the start that do not count, such as the prefill before decoding.
    """

    def __init__(self, model: PreTrainedModel, *, ignore_passes: int = 0) -> None:
        super().__init__(model)
        self._ignored = ignore_passes * len(self._routers)
        self._counts: list[int] = []

    def mean(self) -> float:
        """Return the mean over passes and layers."""
        counted = self._counts[self._ignored :]
        assert counted, "no pass was counted"
        return sum(counted) / len(counted)

    def _hook(self, layer: int) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
            self._counts.append(int(output[2].unique().numel()))

        return count

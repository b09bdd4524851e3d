"""Forward hooks on one module of every layer that has it, and counts of what it does with each source domain."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn


class ModuleHooks:
    """Sees every forward pass of some modules, while it is open as a context.

    Args:
        modules: {layer number: the layer's module}.
    """

    def __init__(self, modules: Mapping[int, nn.Module]) -> None:
        self.modules = modules
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        self._handles = [
            module.register_forward_hook(self._hook(layer)) for layer, module in self.modules.items()
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def saw(self, layer: int, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """Take note of a forward pass of a layer's module."""
        raise NotImplementedError

    def _hook(self, layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.saw(layer, module, args, output)

        return hook


class DomainCounts(ModuleHooks):
    """Adds up a vector for each layer and source domain; it is told the domains before every forward pass."""

    def __init__(self, modules: Mapping[int, nn.Module]) -> None:
        super().__init__(modules)
        self.domains: Sequence[str] = ()
        self.counts: dict[int, dict[str, Tensor]] = {layer: {} for layer in modules}

    def expect(self, domains: Sequence[str]) -> None:
        """Name the source domain of each sequence of the next forward pass."""
        self.domains = domains

    def add(self, layer: int, domain: str, count: Tensor) -> None:
        """Add a vector of numbers to those of a layer and domain, in float64."""
        n = count.double().cpu()
        of_layer = self.counts[layer]
        of_layer[domain] = of_layer.get(domain, torch.zeros_like(n)) + n

    def fractions(self) -> dict[int, dict[str, list[float]]]:
        """Return {layer: {domain: the counts over `whole`}}."""
        return {
            layer: {domain: (n / self.whole(domain, n)).tolist() for domain, n in sorted(counts.items())}
            for layer, counts in self.counts.items()
        }

    def whole(self, domain: str, count: Tensor) -> float:
        """Return what a domain's counts of one layer are shares of."""
        raise NotImplementedError

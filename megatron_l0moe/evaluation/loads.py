"""What routers and gates do with each source domain, counted by forward hooks on one module of every layer.

Of an MoE: the share of the top-k assignments that each expert gets, per MoE layer. transformers'
Ernie4_5_MoeTopKRouter returns (logits [b*S, K], weights [b*S, k], selected experts [b*S, k]). Of a DSMoE: the share of
the tokens in which each block is open, per layer.

Legend: b sequences in a forward pass, S tokens of each, k experts per token, K experts, n blocks.
"""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from megatron_l0moe.errors import L0MoEError


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


class OpenBlocks(DomainCounts):
    """Counts the tokens that open each block.

    Args:
        model: an exported DSMoE.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        layers = enumerate(model.get_decoder().layers)
        mlps = {number: layer.mlp for number, layer in layers if hasattr(layer.mlp, "block_gate")}
        if not mlps:
            raise L0MoEError(f"{type(model).__name__} has no layer with block gates; give an exported DSMoE.")
        super().__init__(mlps)
        self._tokens: dict[str, int] = {}

    def mean_open(self) -> float:
        """Return the mean number of open blocks over tokens and layers."""
        opened = sum(float(n.sum()) for counts in self.counts.values() for n in counts.values())
        return opened / (sum(self._tokens.values()) * len(self.counts))

    def whole(self, domain: str, count: Tensor) -> float:
        """Return the domain's tokens: any number of blocks may be open for one."""
        return self._tokens[domain]

    def saw(self, layer: int, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """Count the open blocks of the tokens of an MLP's input."""
        (states,) = args  # [b, S, h]
        is_open = module.factors(states.flatten(0, 1)).unflatten(0, states.shape[:2]) > 0  # [b, S, n]
        for domain, row in zip(self.domains, is_open, strict=True):
            self.add(layer, domain, row.sum(dim=0))
            if layer == min(self.modules):
                self._tokens[domain] = self._tokens.get(domain, 0) + row.shape[0]


class RouterLoad(DomainCounts):
    """Counts the assignments of each source domain to each expert."""

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
    """Return {layer number: router module} of an Ernie4.5-MoE model."""
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

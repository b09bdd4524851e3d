"""Open blocks of a DSMoE: in which share of the tokens each block is open, per layer and source domain.

Legend: b sequences in a forward pass, S tokens of each, n blocks.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_l0moe.errors import L0MoEError


class OpenBlocks:
    """Counts, while it is open as a context, the tokens that open each block.

    Args:
        model: an exported DSMoE.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        layers = enumerate(model.get_decoder().layers)
        self._mlps = {number: layer.mlp for number, layer in layers if hasattr(layer.mlp, "block_gate")}
        if not self._mlps:
            raise L0MoEError(f"{type(model).__name__} has no layer with block gates; give an exported DSMoE.")
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._domains: Sequence[str] = ()
        self._counts: dict[int, dict[str, Tensor]] = {layer: {} for layer in self._mlps}
        self._tokens: dict[str, int] = {}

    def __enter__(self) -> Self:
        self._handles = [
            mlp.register_forward_pre_hook(self._hook(layer)) for layer, mlp in self._mlps.items()
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def expect(self, domains: Sequence[str]) -> None:
        """Name the source domain of each sequence of the next forward pass."""
        self._domains = domains

    def fractions(self) -> dict[int, dict[str, list[float]]]:
        """Return {layer: {domain: [share of the tokens that open block 0, 1, ... n - 1]}}."""
        return {
            layer: {domain: (n / self._tokens[domain]).tolist() for domain, n in sorted(counts.items())}
            for layer, counts in self._counts.items()
        }

    def mean_open(self) -> float:
        """Return the mean number of open blocks over tokens and layers."""
        opened = sum(float(n.sum()) for counts in self._counts.values() for n in counts.values())
        return opened / (sum(self._tokens.values()) * len(self._counts))

    def _hook(self, layer: int) -> Any:
        def count(module: Any, args: tuple[Tensor, ...]) -> None:
            (states,) = args  # [b, S, h]
            is_open = module.factors(states.flatten(0, 1)).unflatten(0, states.shape[:2]) > 0  # [b, S, n]
            for domain, row in zip(self._domains, is_open, strict=True):
                n = row.sum(dim=0).double().cpu()
                counts = self._counts[layer]
                counts[domain] = counts.get(domain, torch.zeros_like(n)) + n
                if layer == min(self._mlps):
                    self._tokens[domain] = self._tokens.get(domain, 0) + row.shape[0]

        return count

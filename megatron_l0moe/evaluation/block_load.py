"""Open blocks of a DSMoE: in which share of the tokens each block is open, per layer and source domain.

Legend: b sequences in a forward pass, S tokens of each, n blocks.
"""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.evaluation.module_hooks import DomainCounts


class OpenBlocks(DomainCounts):
    """Counts the tokens that open each block.

    Args:
        model: an exported DSMoE.

    Raises:
        L0MoEError: the model has no block gates.
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

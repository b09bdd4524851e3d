"""Which experts take the tokens of which domain, counted in those steps in which it is asked for.

Shapes: s = sequence on this rank, b = micro-batch, D = domains, K = experts.
"""

import torch
from torch import Tensor


class DomainLoad:
    """Counts of routed tokens by the domain of their sequence and by expert: one router, this rank alone.

    `domains` is set only while a micro-batch is in its forward pass. A recomputation in the backward pass, at which
    time the last forward pass may have been another micro-batch's, thus counts nothing.
    """

    def __init__(self) -> None:
        self.counts: Tensor | None = None
        """int64 [D, K] of the running step; None in a step in which nothing is counted."""
        self.domains: Tensor | None = None
        """int64 [b], the domain of each sequence of the micro-batch that passes now."""

    def begin_iteration(self, num_domains: int, num_experts: int, device: torch.device) -> None:
        """Count in this step."""
        self.counts = torch.zeros((num_domains, num_experts), dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, routing_map: Tensor) -> None:
        """Add a micro-batch's routing map [s * b, K], bool."""
        if self.counts is None or self.domains is None:
            return
        by_sequence = routing_map.view(-1, self.domains.shape[0], routing_map.shape[1]).sum(dim=0)
        self.counts.index_add_(0, self.domains, by_sequence)

"""What training asks of our gates and routers, whichever method they belong to, without knowing more of them.

Shapes: s = sequence on this rank, b = micro-batch, h = hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from megatron_l0moe.modules.retention import GateStep

# Groups of parameters that have learning rates of their own, as marks on the parameters.
MASK_GROUP = "l0_mask"
LAMBDA_GROUP = "l0_lambda"
ROUTER_GROUP = "l0_router"
Metrics = dict[str, Any]
"""Metrics by name: one value, or values by layer, counted from 0 and written as text."""
Schedule = Callable[[float], GateStep]
"""Gives a gate its place in the schedule, from the retention that it has at the end."""


class TrainedPart:
    """A gate or router of one layer; beside it a class is one of Megatron's modules."""

    def parameter_groups(self) -> Iterator[tuple[torch.nn.Parameter, str]]:
        """Yield each parameter that has a group of its own, and the group."""
        yield from ()

    def begin_step(self, schedule: Schedule) -> None:
        """Begin an iteration: sums start at zero, and what follows the schedule takes its place in it."""
        raise NotImplementedError

    @classmethod
    def metrics(cls, parts: Sequence[Self]) -> Metrics:
        """Return what the parts of one model chunk say about the step; a collective operation of all their ranks."""
        raise NotImplementedError

    def margins(self, hidden_states: Tensor) -> Tensor | None:
        """Return how far each token is from another choice, [s * b]; None where there is nothing to choose.

        Args:
            hidden_states: [s, b, h], the part's input.
        """
        return None


def parts[P: TrainedPart](model: torch.nn.Module, kind: type[P]) -> Iterator[P]:
    """Yield the parts of a kind that this rank owns, bottom layer first."""
    modules: Iterator[Any] = model.modules()
    return (module for module in modules if isinstance(module, kind))


def parts_by_kind(model: torch.nn.Module) -> dict[type[TrainedPart], list[TrainedPart]]:
    """Return the parts that this rank owns by their class, bottom layer first."""
    kinds: dict[type[TrainedPart], list[TrainedPart]] = {}
    for part in parts(model, TrainedPart):
        kinds.setdefault(type(part), []).append(part)
    return kinds


def choice_margins(logits: Tensor, topk: int) -> Tensor:
    """Return how far each token is from choosing other parts, [N], relative; logits [N, K] of one layer."""
    ranked = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True).values
    chosen, left = ranked[:, topk - 1], ranked[:, topk]
    return (chosen - left) / chosen

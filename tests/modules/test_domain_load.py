"""Counts by domain and expert, by hand, and when nothing is counted."""

import torch
from torch import Tensor

from megatron_l0moe.modules.router import DomainLoad
from megatron_l0moe.runtime import cpu

# 2 positions of 3 sequences, in Megatron's order [s, b]; top 1 of 4 experts
EXPERTS = [0, 1, 1, 0, 2, 3]


def routing_map() -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(EXPERTS), 4).bool()


def test_counts_by_hand() -> None:
    load = DomainLoad()
    load.begin_iteration(3, 4, cpu.device())
    load.domains = torch.tensor([2, 0, 2])
    load.add(routing_map())
    # sequences 0 and 2, of domain 2: experts 0, 0 and 1, 3; sequence 1, of domain 0: experts 1, 2
    expected = [[0, 1, 1, 0], [0, 0, 0, 0], [2, 1, 0, 1]]
    assert load.counts is not None
    assert load.counts.tolist() == expected
    load.add(routing_map())
    assert load.counts.tolist() == [[2 * n for n in row] for row in expected]
    load.begin_iteration(3, 4, cpu.device())
    assert load.counts.sum() == 0


def test_nothing_is_counted_outside_a_forward_pass_or_a_step() -> None:
    load = DomainLoad()
    load.domains = torch.tensor([0, 0, 0])
    load.add(routing_map())
    assert load.counts is None
    load.begin_iteration(1, 4, cpu.device())
    load.domains = None  # a recomputation
    load.add(routing_map())
    assert load.counts is not None
    assert load.counts.sum() == 0

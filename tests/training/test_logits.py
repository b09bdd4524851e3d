"""How close a token is to another choice of experts or blocks, for the parity check, by hand."""

import pytest
import torch

from megatron_l0moe.modules.dsmoe import block_margins
from megatron_l0moe.modules.trained_part import choice_margins


def test_choice_margins():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.4, 0.4]]))
    assert choice_margins(logits, 1).tolist() == pytest.approx([(0.5 - 0.3) / 0.5, 0.0], abs=1e-6)
    assert choice_margins(logits, 2).tolist() == pytest.approx([(0.3 - 0.2) / 0.3, (0.4 - 0.2) / 0.4])


def test_block_margins():
    scores = torch.tensor(
        [
            [0.9, 0.58, 0.1],  # nearest to the threshold: 0.58
            [0.9, 0.2, 0.49],  # nearest: 0.49
            [0.3, 0.28, 0.1],  # none is open: the highest may change place with the next
            [0.49, 0.2, 0.1],  # none is open: the highest may open by the threshold
        ]
    )
    assert block_margins(scores, 0.5).tolist() == pytest.approx([0.08, 0.01, 0.02, 0.01])

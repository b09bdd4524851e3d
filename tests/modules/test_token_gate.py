"""A token's gate: its random start. Its part in every layout is shown by `tests/distributed`."""

import pytest
import torch

from megatron_l0moe.modules.token_gate import keyed_start


def test_the_start_is_random_and_keyed_by_layer_and_seed():
    start = keyed_start(8, 4096, std=0.02, seed=1234, layer=3)
    assert start.shape == (8, 4096)
    assert start.std().item() == pytest.approx(0.02, rel=0.02)
    assert torch.equal(start, keyed_start(8, 4096, std=0.02, seed=1234, layer=3))
    assert not torch.equal(start, keyed_start(8, 4096, std=0.02, seed=1234, layer=4))
    assert not torch.equal(start, keyed_start(8, 4096, std=0.02, seed=1, layer=3))

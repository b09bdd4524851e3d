"""The random start of DSMoE's gates and the masks' router; their part in every layout is in `tests/distributed`."""

from typing import Any

import megatron_models as models
import pytest
import torch
from megatron.core import parallel_state

from megatron_l0moe.modules.dsmoe import BlockGate, BlockGateConfig
from megatron_l0moe.modules.mixture_of_masks import MaskConfig, MaskRouter
from megatron_l0moe.runtime import cpu


def start(kind: str, layer: int, **changes: Any) -> torch.Tensor:
    config = models.transformer_config(hidden_size=4096)
    group = parallel_state.get_tensor_model_parallel_group()
    if kind == "dsmoe":
        blocks = BlockGateConfig(**changes)
        gate = BlockGate(config, block_config=blocks, layer=layer, gated_layers=2, tp_group=group)
        return gate.weight.detach()
    return MaskRouter(config, mask_config=MaskConfig(**changes), layer=layer, tp_group=group).weight.detach()


@pytest.mark.parametrize(
    ("kind", "seed", "std"),
    [("dsmoe", "l0_block_seed", "l0_block_init_std"), ("mom", "l0_masks_seed", "l0_masks_init_std")],
)
def test_the_start_is_random_and_keyed_by_layer_and_seed(kind, seed, std):
    with cpu.one_process_group():
        first = start(kind, 3)
        assert first.shape == (8, 4096)
        assert first.std().item() == pytest.approx(0.02, rel=0.02)
        assert torch.equal(first, start(kind, 3))
        assert not torch.equal(first, start(kind, 4))
        assert not torch.equal(first, start(kind, 3, **{seed: 1}))
        assert torch.allclose(start(kind, 3, **{std: 0.2}), 10 * first)

"""Padded experts are Megatron's own experts, whatever the counts of tokens are."""

import megatron_models as models
import pytest
import torch
from megatron.core.transformer.moe.experts import SequentialMLP

from megatron_l0moe.modules import local_layers as ex
from megatron_l0moe.runtime import cpu

FLOAT32_ATOL = 1e-6  # the same products in blocks of another size


@pytest.fixture
def experts():
    with cpu.one_process_group():
        torch.manual_seed(0)
        module = models.build("moe", experts=3, expert_ffn=8).decoder.layers[1].mlp.experts
        assert isinstance(module, ex.PaddedExperts)
        yield module


@pytest.mark.parametrize("counts", [[3, 0, 5], [1, 130, 2], [128, 128, 128]])
def test_output_and_gradients_equal_megatrons_experts(experts, counts, monkeypatch):
    monkeypatch.setattr(ex, "expert_row_multiple", lambda dtype: 32)
    hidden = torch.randn(sum(counts), models.HIDDEN)
    probs = torch.rand(sum(counts))
    results = []
    for forward in (ex.PaddedExperts.forward, SequentialMLP.forward):
        x, p = hidden.clone().requires_grad_(), probs.clone().requires_grad_()
        output, _ = forward(experts, x, torch.tensor(counts), p)
        loss = (output * torch.arange(1.0, models.HIDDEN + 1)).sum()
        inputs = (x, p, *experts.parameters())
        results.append([output, *torch.autograd.grad(loss, inputs, allow_unused=True)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert torch.allclose(ours, theirs, atol=FLOAT32_ATOL * theirs.abs().max().clamp_min(1).item())


def test_rows_by_hand():
    # two experts with 2 and 3 tokens in blocks of 4: rows 0, 1 and 4, 5, 6
    assert ex._rows([2, 3], [4, 4]).tolist() == [0, 1, 4, 5, 6]


def test_every_expert_sees_a_multiple(experts, monkeypatch):
    seen = []
    for expert in experts.local_experts:
        expert.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    monkeypatch.setattr(ex, "expert_row_multiple", lambda dtype: 4)
    experts(torch.randn(9, models.HIDDEN), torch.tensor([2, 0, 7]), torch.rand(9))
    assert seen == [4, 0, 8]


def test_only_products_whose_kernels_are_compiled_for_each_shape_are_filled_up():
    assert ex.expert_row_multiple(torch.float32) == 1
    assert (ex.expert_row_multiple(torch.bfloat16) == 1) is cpu.has_cuda()

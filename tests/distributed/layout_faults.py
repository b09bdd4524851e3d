"""Faults on purpose: each breaks one thing that keeps the layouts equal, for the time of a `with` block."""

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from megatron_l0moe.modules import hard_concrete, token_gate
from megatron_l0moe.modules.dsmoe import BlockGate, DSMoEMLP
from megatron_l0moe.modules.mixture_of_masks import MaskGate, MaskRouter
from megatron_l0moe.modules.router import L0Router
from megatron_l0moe.modules.trained_part import parts
from megatron_l0moe.training import forward_step


@contextlib.contextmanager
def noise_by_rank(models: list[Any]) -> Iterator[None]:
    """Draw other noise on every rank."""
    original, rank = hard_concrete.gate_noise, torch.distributed.get_rank()

    def drawn(*, seed: int, **key: Any) -> torch.Tensor:
        return original(seed=seed + rank, **key)

    with mock.patch.object(hard_concrete, "gate_noise", drawn):
        yield


@contextlib.contextmanager
def penalty_for_each_micro_batch(models: list[Any]) -> Iterator[None]:
    """Add the whole penalty once for each micro-batch."""
    one = {"return_value": 1}
    with (
        mock.patch.object(forward_step, "get_num_microbatches", **one),
        mock.patch.object(token_gate, "get_num_microbatches", **one),
    ):
        yield


@contextlib.contextmanager
def no_expert_scale(models: list[Any]) -> Iterator[None]:
    """Average the experts' gradients over the expert-data-parallel group alone."""
    for model in models:
        for buffer in model.expert_parallel_buffers:
            for bucket in buffer.buckets:
                bucket.gradient_scaling_factor = 1.0 / buffer.data_parallel_group.size()
    yield


@contextlib.contextmanager
def no_tensor_scale(models: list[Any]) -> Iterator[None]:
    """Attach the router's losses as if its tensor-parallel group were one process."""
    for model in models:
        for router in parts(model, L0Router):
            router.tp_cp_group = SimpleNamespace(size=lambda: 1)
    yield


@contextlib.contextmanager
def no_sequence_sum(models: list[Any]) -> Iterator[None]:
    """Leave the gradients of norms and routers as each rank's part of the sequence gave them."""
    # the package holds the function of the same name, so the module is asked for by its own
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    with mock.patch.object(module, "_allreduce_non_tensor_model_parallel_grads"):
        yield


@contextlib.contextmanager
def local_load(models: list[Any]) -> Iterator[None]:
    """Count the routed tokens of this rank alone."""
    for model in models:
        for router in parts(model, L0Router):
            router.expert_load.group = SimpleNamespace(size=lambda: 1)
        for gate in parts(model, MaskGate):
            gate.set_load.group = SimpleNamespace(size=lambda: 1)
    yield


@contextlib.contextmanager
def no_tensor_sum(models: list[Any]) -> Iterator[None]:
    """Give each rank's gates the gradient of its own channels alone."""
    with mock.patch.object(token_gate, "copy_to_shards", lambda value, group: value):
        yield


@contextlib.contextmanager
def no_loss_share(models: list[Any]) -> Iterator[None]:
    """Attach the loss of each part of the sequence as if it were the whole."""
    for model in models:
        for router in parts(model, MaskRouter):
            config, size = router.mask_config, router.tp_group.size()
            router.mask_config = dataclasses.replace(
                config, l0_masks_balance_coeff=config.l0_masks_balance_coeff * size
            )
        for gate in parts(model, BlockGate):
            gate.gated_layers /= gate.tp_group.size()
    yield


@contextlib.contextmanager
def blocks_of_the_first_rank(models: list[Any]) -> Iterator[None]:
    """Count a rank's channels from 0."""
    for model in models:
        for module in model.modules():
            if isinstance(module, DSMoEMLP):
                module._segments = module._segments - module._segments[0]
    yield


@contextlib.contextmanager
def masks_of_the_first_rank(models: list[Any]) -> Iterator[None]:
    """Cut every rank's part of noise and hard masks from the first channel on."""
    with mock.patch.object(MaskGate, "_shard", lambda self, full: full[:, : self.local_width]):
        yield


@contextlib.contextmanager
def batched_messages(models: list[Any]) -> Iterator[None]:
    """Nothing to patch: the model is built with `batch_p2p_comm` (see `layout_model.build`)."""
    yield


@contextlib.contextmanager
def none(models: list[Any]) -> Iterator[None]:
    """Break nothing."""
    yield

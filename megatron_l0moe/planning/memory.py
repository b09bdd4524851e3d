"""Memory of one GPU in training, from formulas: weights, gradients, optimizer state and `activations.py`. No torch.

State follows Megatron's mixed precision (docs/user-guide/features/dist_optimizer.md of Megatron-LM): bf16 weights 2
bytes, fp32 gradients 4, and fp32 main weights and Adam's two moments 12, which the distributed optimizer divides by the
data-parallel size; in fp32 4, 4 and 8. Experts have data-parallel groups of their own.
"""

import functools
from dataclasses import dataclass

from megatron_l0moe.planning.activations import FLOAT32, Workload, activation_bytes
from megatron_l0moe.recipe.layout import Layout
from megatron_l0moe.sizes.flops import StageModel, parts


@dataclass(frozen=True, kw_only=True)
class RankParameters:
    """Numbers of parameters that one rank holds."""

    dense: int
    """All but experts and gates."""
    experts: int
    trained_dense: int
    trained_experts: int
    gates: int
    """Masks: trained, always fp32. The lambdas of eq. 2, two a layer where it is asked for, are left out."""
    gate_buffers: int
    """Hard masks, input means and loads, always fp32 (or as wide)."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.dense + self.experts + self.gates

    @property
    def trained(self) -> int:
        """Parameters with a gradient."""
        return self.trained_dense + self.trained_experts + self.gates


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU."""

    rank: int
    """Pipeline rank."""
    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Kept from the forward to the backward pass, of all micro-batches in flight."""
    working: float
    """Of the layer, or of the logits, that is computed now."""

    @property
    def state(self) -> float:
        """Weights, gradients and optimizer."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """All that a plan counts."""
        return self.state + self.activations + self.working


def peak_memory(model: StageModel, layout: Layout, workload: Workload) -> Memory:
    """Return the memory of the pipeline rank that needs most."""
    ranks = (rank_memory(model, layout, workload, rank) for rank in range(layout.pipeline))
    return max(ranks, key=lambda memory: memory.total)


def rank_memory(model: StageModel, layout: Layout, workload: Workload, rank: int) -> Memory:
    """Return the memory of a GPU of one pipeline rank."""
    counts = rank_parameters(model, layout, rank)
    activations, working = activation_bytes(model, layout, workload, rank)
    wide = workload.element_bytes
    return Memory(
        rank=rank,
        weights=wide * (counts.dense + counts.experts) + FLOAT32 * (counts.gates + counts.gate_buffers),
        gradients=FLOAT32 * counts.trained,
        optimizer=optimizer_bytes(counts, layout, bf16=workload.bf16),
        activations=activations,
        working=working,
    )


@functools.lru_cache(maxsize=65536)
def rank_parameters(model: StageModel, layout: Layout, rank: int) -> RankParameters:
    """Return what a rank holds: tensor parallelism cuts matrices, norms and routers are on every rank."""
    a, counts, t = model.architecture, model.counts, layout.tensor
    held = parts(model, layout, rank)
    layers = sum(part.layers for part in held)
    upper = sum(part.upper for part in held)
    first, last = any(part.first for part in held), any(part.last for part in held)
    copies = (first + last) if not counts.tied else int(first or last)
    is_moe = model.stage == "moe"
    dense_ffns = layers - upper if is_moe else layers
    ffn = model.dense_ffn_weights // t
    dense = (
        layers * (model.attention_weights // t + 2 * a.hidden_size)
        + dense_ffns * ffn
        + (upper * model.router_weights if is_moe else 0)
        + copies * (counts.embedding // t)
        + (a.hidden_size if last else 0)
    )
    if is_moe:
        experts = upper * model.experts_weights // (layout.expert * layout.etp)
        loads = 2 * upper * counts.num_experts
        return RankParameters(
            dense=dense,
            experts=experts,
            trained_dense=dense,
            trained_experts=experts,
            gates=0,
            gate_buffers=loads,
        )
    return RankParameters(
        dense=dense,
        experts=0,
        trained_dense=upper * ffn if model.trains_weights else 0,
        trained_experts=0,
        gates=upper * (a.ffn_hidden_size // t),
        gate_buffers=upper * (a.ffn_hidden_size // t + a.hidden_size + 3),
    )


def optimizer_bytes(counts: RankParameters, layout: Layout, *, bf16: bool) -> float:
    """Return the bytes of main weights and moments; fp32 parameters are their own main weights."""
    moments, main = 2 * FLOAT32, FLOAT32 if bf16 else 0
    replicas = expert_replicas = 1
    if layout.distributed_optimizer:
        replicas = layout.data * layout.context
        expert_replicas = max(layout.processes // layout.expert_product, 1)
    return (
        counts.trained_dense * (moments + main) / replicas
        + counts.gates * moments / replicas
        + counts.trained_experts * (moments + main) / expert_replicas
    )

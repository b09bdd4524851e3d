"""Memory of one GPU in training and bytes on disk, from formulas. No torch.

State follows Megatron's mixed precision (docs/user-guide/features/dist_optimizer.md of Megatron-LM): bf16 weights 2
bytes, fp32 gradients 4, and fp32 main weights and Adam's two moments 12, which the distributed optimizer divides by the
data-parallel size; in fp32 4, 4 and 8. Experts have data-parallel groups of their own.

Activations follow Korthikanti et al. (arXiv:2205.05198): what autograd keeps, module by module, here for RMSNorm,
grouped queries, fused attention and fused SwiGLU, without dropout. A norm keeps its input; a linear layer keeps its
input only if its weights are trained; attention and SwiGLU keep theirs always.

Legend, for one rank: T tokens of a micro-batch (divided by context parallelism), H hidden size, q and g channels of all
query and all key heads, F FFN channels, E expert FFN channels, V vocabulary, K experts, k experts of a token, t
tensor-parallel size, u = t with sequence parallelism and 1 without, e bytes of an element (bf16 2, fp32 4).
"""

import dataclasses
import functools
from dataclasses import dataclass, field

from megatron_l0moe.recipe.layout import Layout
from megatron_l0moe.sizes.flops import Recompute, StageModel, parts

FLOAT32 = 4
ROUTING_MARGIN = 1.5
"""Rows that the busiest rank's experts get, against balanced routing, where experts are spread: an assumption."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a training job does in each step, beside its layout."""

    seq_length: int
    micro_batch: int
    """The number of sequences."""
    global_batch: int
    """The number of sequences."""
    bf16: bool = True
    recompute: Recompute = field(default_factory=Recompute)
    overlaps_gradients: bool = False
    """Gradients are reduced, and weights gathered, while computing."""

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of an activation or weight."""
        return 2 if self.bf16 else FLOAT32

    def micro_batches(self, layout: Layout) -> int:
        """Micro-batches of a step on each data-parallel rank."""
        return max(self.global_batch // (self.micro_batch * layout.data), 1)


def activation_bytes(model: StageModel, layout: Layout, workload: Workload, rank: int) -> tuple[float, float]:
    """Return the bytes that a pipeline rank keeps for backward passes, and its largest working set on top of them."""
    recompute, held = workload.recompute, parts(model, layout, rank)
    boundary = _bytes(layout, workload, _hidden(model, layout))
    plain = dataclasses.replace(workload, recompute=Recompute()) if recompute.full else workload
    dense, upper = (layer_bytes(model, layout, plain, upper=is_upper) for is_upper in (False, True))
    if recompute.full:
        kept = sum(-(-part.layers // recompute.group) for part in held) * boundary
    elif model.stage == "moe" or recompute.redoes("mlp"):
        kept = sum(part.dense * dense + part.upper * upper for part in held)
    else:  # no gradient goes through the frozen layers below the masks, nor through the first masked one's attention
        below = attention_bytes(model, layout, workload)
        if not model.trains_weights:  # nor through its gate and up
            width = model.architecture.ffn_hidden_size / layout.tensor
            below += _bytes(layout, workload, 2 * width)
        kept = sum(part.upper * upper - part.has_first_upper * below for part in held)
    kept *= chunks_in_flight(layout, workload.micro_batches(layout), rank) / len(held)
    # One layer: recomputed, or the gradients of what it kept.
    busiest = upper if any(part.upper for part in held) else dense
    working = busiest * (recompute.group if recompute.full else 1)
    if any(part.last for part in held):
        kept += (
            2 if model.stage == "moe" else 1
        ) * boundary  # the final norm's input, a trained LM head's input
        working = max(working, logit_bytes(model, layout, workload))
    return kept, working


def chunks_in_flight(layout: Layout, micro_batches: int, rank: int) -> int:
    """Return how many chunks' activations a rank holds at once (core/pipeline_parallel/schedules.py:910)."""
    pipeline, chunks = layout.pipeline, layout.virtual_pipeline
    if pipeline == 1:
        return 1
    warm_up = pipeline - rank - 1
    if chunks > 1:
        warm_up = 2 * warm_up + (chunks - 1) * pipeline
    return min(warm_up + 1, micro_batches * chunks)


def layer_bytes(model: StageModel, layout: Layout, workload: Workload, *, upper: bool) -> float:
    """Return what one layer keeps where gradients flow through all of it."""
    kept = attention_bytes(model, layout, workload)
    if not upper or model.stage == "expert":
        return kept + ffn_bytes(
            model, layout, workload, trained=model.stage == "moe" or (upper and model.trains_weights)
        )
    return kept + moe_bytes(model, layout, workload)


def attention_bytes(model: StageModel, layout: Layout, workload: Workload) -> float:
    """Return what attention keeps, with the norm before it and the input of the norm after it."""
    hidden, q, g = _hidden(model, layout), model.query_width, model.kv_width
    norms = (3 if model.stage == "moe" else 2) * hidden  # both inputs, and the trained projection's input
    # q and k after RoPE, the projection of all three (v is a view of it), and the output of the scores
    return _bytes(layout, workload, norms + ((q + g) + (q + 2 * g) + q) / layout.tensor)


def ffn_bytes(model: StageModel, layout: Layout, workload: Workload, *, trained: bool) -> float:
    """Return what a dense FFN keeps: its input, gate and up [2 F], and their product (times the mask) [F]."""
    hidden, width = _hidden(model, layout), model.architecture.ffn_hidden_size / layout.tensor
    if workload.recompute.redoes("mlp"):
        return _bytes(layout, workload, hidden)
    return _bytes(layout, workload, trained * hidden + 3 * width)


def moe_bytes(model: StageModel, layout: Layout, workload: Workload) -> float:
    """Return what an MoE layer keeps: its input, routing [K] in fp32, and of each routed row [H], [2 E] and [E]."""
    hidden, counts = _hidden(model, layout), model.counts
    if workload.recompute.redoes("moe"):
        return _bytes(layout, workload, hidden)
    split = layout.tensor if layout.sequence else 1
    rows = counts.top_k * layout.etp / split * (ROUTING_MARGIN if layout.expert > 1 else 1.0)
    width = model.expert_ffn / layout.etp
    routing = 3 * FLOAT32 * counts.num_experts / split  # logits, probabilities, and the losses' probabilities
    routed = rows * (model.architecture.hidden_size + 3 * width)
    return _bytes(layout, workload, hidden + routed) + _tokens(layout, workload) * routing


def logit_bytes(model: StageModel, layout: Layout, workload: Workload) -> float:
    """Return the logits in fp32, which become probabilities in place, and in bf16.

    Source: core/tensor_parallel/cross_entropy.py.
    """
    width = FLOAT32 + (2 if workload.bf16 else 0)
    return _tokens(layout, workload) * model.architecture.vocab_size / layout.tensor * width


def _hidden(model: StageModel, layout: Layout) -> float:
    """Return the share of a token's hidden state that a rank holds between the layers."""
    return model.architecture.hidden_size / (layout.tensor if layout.sequence else 1)


def _bytes(layout: Layout, workload: Workload, elements: float) -> float:
    return elements * _tokens(layout, workload) * workload.element_bytes


def _tokens(layout: Layout, workload: Workload) -> float:
    return workload.micro_batch * workload.seq_length / layout.context


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
    """What the layer or the logits take that are computed at the moment."""

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


UINT16_IDS = 65500
"""Vocabularies below it are stored in two bytes a token (core/datasets/indexed_dataset.py, optimal_dtype)."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSize:
    """Bytes of one checkpoint of a training job."""

    weights: int
    optimizer: int

    @property
    def total(self) -> int:
        """Both."""
        return self.weights + self.optimizer


def checkpoint_size(model: StageModel, *, bf16: bool) -> CheckpointSize:
    """Return the size of a torch_dist checkpoint, which does not depend on the layout."""
    one = Layout()
    counts = rank_parameters(model, one, 0)
    wide = 2 if bf16 else 4
    return CheckpointSize(
        weights=wide * (counts.dense + counts.experts) + 4 * (counts.gates + counts.gate_buffers),
        optimizer=int(optimizer_bytes(counts, one, bf16=bf16)),
    )


def expert_file_bytes(moe: StageModel, *, bf16: bool, with_weights: bool = True) -> int:
    """Return the size of one expert.safetensors: its weights, the units' numbers (int32) and the input means (fp32)."""
    one = moe.experts_weights // moe.counts.num_experts
    per_layer = 4 * (moe.expert_ffn + moe.architecture.hidden_size)
    return moe.upper_layers * (per_layer + (one * (2 if bf16 else 4) if with_weights else 0))


def token_bytes(vocab_size: int) -> int:
    """Return the bytes of one token in Megatron's .bin files."""
    return 2 if vocab_size < UINT16_IDS else 4

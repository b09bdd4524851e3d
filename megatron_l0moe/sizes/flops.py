"""The model that a training stage holds, and the floating-point operations it takes; a multiply-add counts two.

Legend: H hidden size, q = all query heads' channels, s sequence length.

Counted are matrix products and attention scores, causal ones at half of s^2, as in Megatron
(training/training.py, num_floating_point_operations) and in PaLM's appendix B (arXiv:2204.02311); norms, activations,
softmax, routing and the optimizer are not.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Literal

from megatron_l0moe.recipe.layout import Layout
from megatron_l0moe.sizes.architecture import Architecture
from megatron_l0moe.sizes.parameters import ParameterCounts, count_parameters, l0moe_counts

TrainingStage = Literal["expert", "moe"]


@dataclass(frozen=True, kw_only=True, eq=False)  # hashed by identity, as a key of caches
class StageModel:
    """A dense model under L0 masks (stage `expert`), or an L0-MoE (stage `moe`)."""

    stage: TrainingStage
    architecture: Architecture
    counts: ParameterCounts
    """The weights; in the stage `expert` those of the dense model: the gates come on top."""
    dense_layers: int
    """Bottom layers without masks or experts."""
    expert_ffn: int
    trains_weights: bool = True
    """Whether the expert stage trains the MLPs too, or masks only."""

    @property
    def upper_layers(self) -> int:
        """Layers with a mask or with experts."""
        return self.architecture.num_layers - self.dense_layers

    @property
    def query_width(self) -> int:
        """Channels of all query heads."""
        return self.architecture.num_attention_heads * self.architecture.head_dim

    @property
    def kv_width(self) -> int:
        """Channels of all key heads, which are those of all value heads."""
        return self.architecture.num_query_groups * self.architecture.head_dim

    @property
    def qkv_bias(self) -> int:
        """Biases of one layer's q, k and v."""
        return self.query_width + 2 * self.kv_width if self.architecture.qkv_bias else 0

    @property
    def attention_weights(self) -> int:
        """Weights of one layer's attention, biases included."""
        return self.counts.attention // self.architecture.num_layers

    @property
    def dense_ffn_weights(self) -> int:
        """Weights of one dense FFN; 0 where the model has none."""
        layers = self.architecture.num_layers if self.stage == "expert" else self.dense_layers
        return self.counts.dense_ffn // layers if layers else 0

    @property
    def experts_weights(self) -> int:
        """Weights of all K experts of one layer."""
        return self.counts.experts // self.upper_layers

    @property
    def router_weights(self) -> int:
        """Weights of one router."""
        return self.counts.routers // self.upper_layers


@dataclass(frozen=True, kw_only=True)
class PipelinePart:
    """What one pipeline rank holds of the model, or one of its chunks."""

    dense: int
    """Bottom layers."""
    upper: int
    """Layers with a mask or with experts."""
    has_first_upper: bool
    """Holds the lowest layer with a mask, where the gradients of the expert stage end."""
    first: bool
    """Holds the embedding."""
    last: bool
    """Holds the final norm and the LM head."""

    @property
    def layers(self) -> int:
        """Layers of any kind."""
        return self.dense + self.upper


def stage_model(
    architecture: Architecture,
    stage: TrainingStage,
    *,
    dense_layers: int,
    num_experts: int,
    expert_ffn: int,
    top_k: int,
    trains_weights: bool = True,
) -> StageModel:
    """Return the model of a stage of a recipe with these sizes."""
    config = architecture.hf_config("bfloat16")
    moe = l0moe_counts(
        config, dense_layers=dense_layers, num_experts=num_experts, expert_ffn=expert_ffn, top_k=top_k
    )
    return StageModel(
        stage=stage,
        architecture=architecture,
        counts=moe if stage == "moe" else count_parameters(config),
        dense_layers=dense_layers,
        expert_ffn=expert_ffn,
        trains_weights=trains_weights,
    )


def dense_model(architecture: Architecture) -> StageModel:
    """Return a dense model all of whose parameters train: the stage `moe` without layers of experts."""
    return StageModel(
        stage="moe",
        architecture=architecture,
        counts=count_parameters(architecture.hf_config("bfloat16")),
        dense_layers=architecture.num_layers,
        expert_ffn=0,
    )


def parts(model: StageModel, layout: Layout, rank: int) -> tuple[PipelinePart, ...]:
    """Return the chunks of a pipeline rank; chunk c of rank r is piece c * pipeline + r of the layers."""
    layers = model.architecture.num_layers
    return _cut(layers, model.dense_layers, layout.stages, layout.pipeline_layers)[rank :: layout.pipeline]


@functools.cache
def _cut(layers: int, dense_layers: int, pieces: int, given: tuple[int, ...]) -> tuple[PipelinePart, ...]:
    split = given or (layers // pieces,) * pieces
    starts = itertools.accumulate(split, initial=0)
    return tuple(
        PipelinePart(
            dense=min(max(dense_layers - start, 0), width),
            upper=width - min(max(dense_layers - start, 0), width),
            has_first_upper=start <= dense_layers < start + width,
            first=piece == 0,
            last=piece == pieces - 1,
        )
        for piece, (start, width) in enumerate(zip(starts, split, strict=False))
    )


FC1_SHARE = 2 / 3
"""The share of gate and up together in an FFN's weights."""


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """What the backward pass computes again: Megatron's --recompute-granularity and its companions."""

    granularity: str = "none"
    """none, selective or full."""
    modules: tuple[str, ...] = ()
    """The modules of selective recomputation: core_attn, mlp, moe."""
    group: int = 1
    """Layers that are recomputed together, of full uniform recomputation."""

    @property
    def full(self) -> bool:
        """Whether whole layers are recomputed."""
        return self.granularity == "full"

    def redoes(self, module: str) -> bool:
        """Whether a module's activations are not kept."""
        return self.full or (self.granularity == "selective" and module in self.modules)

    @property
    def text(self) -> str:
        """One word for tables."""
        if self.full:
            return "full" if self.group == 1 else f"full/{self.group}"
        return "+".join(self.modules) if self.granularity == "selective" else "none"


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one token."""

    forward: float
    backward: float
    recomputed: float

    @property
    def model(self) -> float:
        """What training needs: MFU counts this."""
        return self.forward + self.backward

    @property
    def executed(self) -> float:
        """What the GPUs do."""
        return self.model + self.recomputed

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            forward=self.forward + other.forward,
            backward=self.backward + other.backward,
            recomputed=self.recomputed + other.recomputed,
        )


@dataclass(frozen=True, kw_only=True)
class LayerFlops:
    """FLOPs of one token's forward pass through the parts of one layer."""

    attention: float
    """Projections."""
    scores: float
    """Products of queries, keys and values."""
    ffn: float
    """FFN, or router and the k experts of the token."""
    experts: float = 0.0
    """The part of the FFNs' operations that experts do."""


@functools.lru_cache(maxsize=64)
def layer_flops(model: StageModel, seq_length: int, *, upper: bool) -> LayerFlops:
    """Return the forward FLOPs of a layer, dense or (upper) with mask or experts."""
    attention = 2.0 * (model.attention_weights - model.qkv_bias)
    scores = 2.0 * seq_length * model.query_width  # 2 products * 2 s q, half of it causal
    if not upper or model.stage == "expert":
        return LayerFlops(attention=attention, scores=scores, ffn=2.0 * model.dense_ffn_weights)
    counts = model.counts
    experts = 2.0 * model.experts_weights * counts.top_k / counts.num_experts
    return LayerFlops(
        attention=attention, scores=scores, ffn=experts + 2.0 * model.router_weights, experts=experts
    )


@functools.lru_cache(maxsize=4096)
def part_flops(model: StageModel, part: PipelinePart, seq_length: int, recompute: Recompute) -> Flops:
    """Return the FLOPs of one training token in a part of the model."""
    head = 2.0 * model.counts.lm_head if part.last else 0.0
    total = Flops(forward=head, backward=_backward_head(model) * head, recomputed=0.0)
    for upper, layers in ((False, part.dense), (True, part.upper)):
        if not layers:
            continue  # a dense model has no upper layers to take sizes from
        layer = layer_flops(model, seq_length, upper=upper)
        one = Flops(
            forward=layer.attention + layer.scores + layer.ffn,
            backward=_backward(model, layer, upper, recompute),
            recomputed=_recomputed(layer, upper, model, recompute),
        )
        total += Flops(
            forward=layers * one.forward, backward=layers * one.backward, recomputed=layers * one.recomputed
        )
    if model.stage == "expert" and part.has_first_upper and not _starts_at_embedding(recompute):
        # Nothing below it is trained: its attention has no backward pass, nor has the input of a frozen fc1. (That of a
        # trained one is computed and not used, core/tensor_parallel/layers.py, LinearWithGradAccumulation...)
        layer = layer_flops(model, seq_length, upper=True)
        saved = layer.attention + 2.0 * layer.scores
        saved += 0.0 if model.trains_weights else FC1_SHARE * layer.ffn
        total += Flops(forward=0.0, backward=-saved, recomputed=0.0)
    return total


def training_flops(model: StageModel, seq_length: int, recompute: Recompute) -> Flops:
    """Return the FLOPs of one training token in the whole model."""
    whole = PipelinePart(
        dense=model.dense_layers, upper=model.upper_layers, has_first_upper=True, first=True, last=True
    )
    return part_flops(model, whole, seq_length, recompute)


def forward_flops(model: StageModel, seq_length: int) -> float:
    """Return the FLOPs of one token of a prefill of `seq_length` tokens, logits of every position included."""
    return training_flops(model, seq_length, Recompute()).forward


def _backward_head(model: StageModel) -> float:
    return 2.0 if model.stage == "moe" else 1.0  # frozen in the expert stage: the gradient of its input only


def _backward(model: StageModel, layer: LayerFlops, upper: bool, recompute: Recompute) -> float:
    if model.stage == "moe":
        return 2.0 * (layer.attention + layer.scores + layer.ffn)
    if not upper and not _starts_at_embedding(recompute):
        return 0.0
    weights = layer.ffn if upper and model.trains_weights else 0.0
    return layer.attention + 2.0 * layer.scores + layer.ffn + weights


def _recomputed(layer: LayerFlops, upper: bool, model: StageModel, recompute: Recompute) -> float:
    if recompute.full:
        return layer.attention + layer.scores + layer.ffn
    if model.stage == "expert" and not upper and not _starts_at_embedding(recompute):
        return 0.0
    is_moe = upper and model.stage == "moe"
    scores = layer.scores if recompute.redoes("core_attn") else 0.0
    return scores + (layer.ffn if recompute.redoes("moe" if is_moe else "mlp") else 0.0)


def _starts_at_embedding(recompute: Recompute) -> bool:
    """Whether the expert stage's gradients go down to the embedding (training/model.py, _recomputes_mlps)."""
    return recompute.redoes("mlp")

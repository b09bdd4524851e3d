"""The model that a training stage holds: its sizes, its counts, and where its layers lie in a pipeline."""

import functools
import itertools
from dataclasses import dataclass
from typing import Literal

from megatron_l0moe.conversion.architecture import Architecture
from megatron_l0moe.planning.layouts import Layout
from megatron_l0moe.planning.parameters import ParameterCounts, count_parameters, l0moe_counts

TrainingStage = Literal["expert", "moe"]


@dataclass(frozen=True, kw_only=True, eq=False)  # hashed by identity, as a key of caches
class StageModel:
    """A dense model under L0 masks (stage `expert`), or an L0-MoE (stage `moe`)."""

    stage: TrainingStage
    architecture: Architecture
    counts: ParameterCounts
    """Of the dense model in the stage `expert`: the gates come on top."""
    dense_layers: int
    """Bottom layers without masks or experts."""
    expert_ffn: int
    trains_weights: bool = True
    """Of the expert stage: masks and MLPs, or masks only."""

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
class Part:
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
    """Return the model of a stage of a recipe with these sizes.

    Raises:
        L0MoEError: as many dense layers as layers.
    """
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


def parts(model: StageModel, layout: Layout, rank: int) -> tuple[Part, ...]:
    """Return the chunks of a pipeline rank; chunk c of rank r is piece c * pipeline + r of the layers."""
    layers = model.architecture.num_layers
    return _cut(layers, model.dense_layers, layout.stages, layout.pipeline_layers)[rank :: layout.pipeline]


@functools.cache
def _cut(layers: int, dense_layers: int, pieces: int, given: tuple[int, ...]) -> tuple[Part, ...]:
    split = given or (layers // pieces,) * pieces
    starts = itertools.accumulate(split, initial=0)
    return tuple(
        Part(
            dense=min(max(dense_layers - start, 0), width),
            upper=width - min(max(dense_layers - start, 0), width),
            has_first_upper=start <= dense_layers < start + width,
            first=piece == 0,
            last=piece == pieces - 1,
        )
        for piece, (start, width) in enumerate(zip(starts, split, strict=False))
    )

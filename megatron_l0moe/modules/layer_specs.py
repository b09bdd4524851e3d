"""Layer specs: dense layers at the bottom, then those of the stage: L0, MoE, DSMoE or Mixture-of-Masks.

The only place that builds Megatron specs. The local spec and the Transformer Engine spec yield the same
checkpoint keys, so a checkpoint made with one loads with the other.
"""

import copy
import functools
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_l0moe.modules.dsmoe import BlockGateConfig, DSMoEMLP
from megatron_l0moe.modules.hard_concrete import HardConcreteConfig
from megatron_l0moe.modules.l0_mlp import L0MLP
from megatron_l0moe.modules.local_layers import LocalAttention, PaddedExperts, RMSNorm, SeparateRMSNorm
from megatron_l0moe.modules.mixture_of_masks import MaskConfig, MoMMLP
from megatron_l0moe.modules.retention import RetentionConfig
from megatron_l0moe.modules.router import L0Router, RouterConfig

ModelKind = Literal["dense", "expert", "moe", "dsmoe", "mom"]

# Checkpoint names of the norms that Transformer Engine fuses into the next linear layer.
ATTENTION_NORM_KEYS = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
MLP_NORM_KEYS = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What the layers of a model are made of."""

    stage: ModelKind
    dense_layers: int
    gate: HardConcreteConfig
    retention: RetentionConfig
    router: RouterConfig
    blocks: BlockGateConfig = field(default_factory=BlockGateConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)


def block_spec(
    config: TransformerConfig, plan: LayerPlan, *, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Return the specs of the layers that this pipeline stage owns."""
    use_te = config.transformer_impl == "transformer_engine"
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=use_te, normalization=config.normalization, vp_stage=vp_stage
    )
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    assert len(spec.layer_specs) == get_num_layers_to_build(config, vp_stage=vp_stage)
    layers = [_layer(layer, config, plan, first + i, use_te) for i, layer in enumerate(spec.layer_specs)]
    return TransformerBlockSubmodules(
        layer_specs=layers, layer_norm=spec.layer_norm if use_te else SeparateRMSNorm
    )


def _layer(
    stock: ModuleSpec, config: TransformerConfig, plan: LayerPlan, index: int, use_te: bool
) -> ModuleSpec:
    spec, parts = copy.copy(stock), copy.copy(stock.submodules)
    spec.submodules = parts
    is_dense = index < plan.dense_layers
    if not use_te:
        attention = parts.self_attention = copy.copy(parts.self_attention)
        attention.submodules = copy.copy(attention.submodules)
        attention.submodules.core_attention = LocalAttention
        parts.input_layernorm = RMSNorm
        parts.pre_mlp_layernorm = RMSNorm if is_dense or plan.stage == "dense" else SeparateRMSNorm
        is_moe = plan.stage == "moe" and not is_dense
        # Upstream's local spec also maps an MoE layer's norm to fc1, where its TE spec keeps it apart.
        parts.sharded_state_dict_keys_map = {**ATTENTION_NORM_KEYS, **({} if is_moe else MLP_NORM_KEYS)}
    if is_dense or plan.stage == "dense":
        return spec
    if plan.stage == "moe":
        parts.mlp = _with_router(parts.mlp, plan)
    else:
        _place_gated_mlp(parts, config, plan, index, use_te)
    return spec


def _with_router(stock: Any, plan: LayerPlan) -> Any:
    assert stock.func is MoELayer, f"expected a partial of MoELayer, got {stock!r}"
    submodules = copy.copy(stock.keywords["submodules"])
    submodules.router = functools.partial(L0Router, router_config=plan.router)
    if submodules.experts.func is SequentialMLP:
        submodules.experts = functools.partial(PaddedExperts, **submodules.experts.keywords)
    return functools.partial(stock.func, *stock.args, **{**stock.keywords, "submodules": submodules})


def _place_gated_mlp(
    parts: Any, config: TransformerConfig, plan: LayerPlan, index: int, use_te: bool
) -> None:
    submodules: MLPSubmodules = parts.mlp.keywords["submodules"]
    if use_te:
        # The gates need the normalised input: take the norm out of fc1, keep its checkpoint name.
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        backend = TESpecProvider()
        submodules = MLPSubmodules(
            linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear()
        )
        parts.pre_mlp_layernorm = backend.layer_norm(has_residual=True)
        parts.sharded_state_dict_keys_map = dict(MLP_NORM_KEYS)
    if plan.stage == "dsmoe":
        parts.mlp = functools.partial(
            DSMoEMLP.as_mlp_submodule,
            submodules=submodules,
            block_config=plan.blocks,
            layer=index,
            gated_layers=config.num_layers - plan.dense_layers,
        )
        return
    if plan.stage == "mom":
        parts.mlp = functools.partial(
            MoMMLP.as_mlp_submodule,
            submodules=submodules,
            mask_config=plan.masks,
            gate_config=plan.gate,
            retention_config=plan.retention,
            layer=index,
        )
        return
    parts.mlp = functools.partial(
        L0MLP.as_mlp_submodule,
        submodules=submodules,
        gate_config=plan.gate,
        retention_config=plan.retention,
        layer=index,
    )

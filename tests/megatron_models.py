"""Tiny GPT models of every stage, for tests that run inside `cpu.one_process_group()`."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_l0moe.modules.hard_concrete import HardConcreteConfig
from megatron_l0moe.modules.layer_specs import LayerPlan, block_spec
from megatron_l0moe.modules.retention import RetentionConfig
from megatron_l0moe.modules.router import RouterConfig

LAYERS, DENSE, HIDDEN, FFN, VOCAB, SEQUENCE = 3, 1, 16, 24, 64, 12


def plan(stage: str, **retention: Any) -> LayerPlan:
    return LayerPlan(
        stage=stage,  # type: ignore[arg-type]
        dense_layers=DENSE,
        gate=HardConcreteConfig(),
        # eq. 2, whose lambdas most tests look at; those of the budget ask for it
        retention=RetentionConfig(**{"l0_expert_ffn": 8, "l0_retention_control": "lagrangian", **retention}),
        router=RouterConfig(),
    )


def transformer_config(**changes: Any) -> TransformerConfig:
    """A small Llama-like config of local modules without dropout and fusions."""
    options: dict[str, Any] = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "transformer_impl": "local",
        "hetereogenous_dist_checkpoint": True,
    }
    return TransformerConfig(**(options | changes))


def build(
    stage: str, *, experts: int = 3, expert_ffn: int = FFN, layer_plan: LayerPlan | None = None
) -> GPTModel:
    """A float32 model with tied embeddings, grouped attention and SwiGLU."""
    moe: dict[str, Any] = {}
    if stage == "moe":
        moe = {
            "num_moe_experts": experts,
            "moe_ffn_hidden_size": expert_ffn,
            "moe_router_topk": 2,
            "moe_layer_freq": [0] * DENSE + [1] * (LAYERS - DENSE),
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.01,
            "moe_token_dispatcher_type": "allgather",
            "moe_router_dtype": "fp32",
        }
    config = transformer_config(**moe)
    return GPTModel(
        config=config,
        transformer_layer_spec=block_spec(config, layer_plan or plan(stage)),
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def logits(model: GPTModel) -> torch.Tensor:
    tokens = torch.arange(2 * SEQUENCE).reshape(2, SEQUENCE) * 7 % VOCAB
    positions = torch.arange(SEQUENCE).expand(2, SEQUENCE)
    return model(tokens, positions, None).float()


def copy_backbone(source: GPTModel, target: GPTModel) -> None:
    """Copy every tensor that both models have by the same name and shape."""
    state = target.state_dict()
    shared = {
        name: tensor
        for name, tensor in source.state_dict().items()
        if name in state and isinstance(tensor, torch.Tensor) and state[name].shape == tensor.shape
    }
    target.load_state_dict(shared, strict=False)

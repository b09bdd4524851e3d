"""The tiny model of the layout matrix, built with the product's specs, and its batches.

Shapes: B = sequences of a global batch, b = micro-batch, s = sequence. Imported after `cpu.install()`.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from distributed.layouts import Case, Layout
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron_models import transformer_config

from megatron_l0moe.modules.dsmoe import BlockGateConfig
from megatron_l0moe.modules.hard_concrete import HardConcreteConfig, HardConcreteGate
from megatron_l0moe.modules.layer_specs import LayerPlan, block_spec
from megatron_l0moe.modules.mixture_of_masks import MaskConfig, MaskGate
from megatron_l0moe.modules.retention import RetentionConfig
from megatron_l0moe.modules.router import RouterConfig
from megatron_l0moe.modules.trained_part import parts
from megatron_l0moe.training.arguments import JobSettings, StageConfig
from megatron_l0moe.training.model import prepare_for_training

LAYERS, DENSE, HIDDEN, FFN, VOCAB, SEQUENCE, EXPERTS = 4, 1, 16, 24, 64, 16, 4
BATCH = 4
STEPS = 20
INIT_STD = 0.2  # gradients of size 1e-3 to 1, so that 1e-6 is far below them
RECOMPUTE: dict[str | None, dict[str, Any]] = {
    None: {},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
}


def settings(case: Case) -> JobSettings:
    """Return our settings as a recipe's flags would give them."""
    plan = LayerPlan(
        stage=case.stage,  # type: ignore[arg-type]
        dense_layers=DENSE,
        gate=HardConcreteConfig(),
        retention=RetentionConfig(l0_expert_ffn=8, l0_retention_control=case.control),  # type: ignore[arg-type]
        router=RouterConfig(),
        blocks=BlockGateConfig(l0_block_init_std=0.5),  # scores on both sides of the threshold, far from it
        # choices that a rounding does not change, and a loss as large as the language model's
        masks=MaskConfig(l0_masks=4, l0_masks_init_std=0.5, l0_masks_balance_coeff=0.1),
    )
    return JobSettings(StageConfig(l0_stage=case.stage, l0_dense_layers=DENSE), plan)  # type: ignore[arg-type]


def arguments(layout: Layout) -> argparse.Namespace:
    """Return what the product's forward step reads of Megatron's arguments."""
    return argparse.Namespace(
        curr_iteration=0,
        train_iters=STEPS,
        context_parallel_size=1,
        micro_batch_size=layout.micro_batch,
        seq_length=SEQUENCE,
        pipeline_model_parallel_size=layout.pipeline,
    )


def build(layout: Layout, case: Case, *, batched_messages: bool = False) -> list[Any]:
    """Return the chunks of this rank, frozen and wrapped as Megatron's loop does it."""
    ours = settings(case)

    def layer_spec(config: GPTModelConfig, vp_stage: int | None) -> Any:
        return block_spec(config.transformer, ours.plan, vp_stage=vp_stage)

    config = GPTModelConfig(
        transformer=_transformer(layout, case, batched_messages),
        transformer_layer_spec=layer_spec,
        vocab_size=VOCAB,
        seq_length=SEQUENCE,
        share_embeddings_and_output_weights=case.tied,
        position_embedding_type="rope",
        pre_wrap_hooks=[lambda models: prepare_for_training(models, ours)],
    )
    wrap = DistributedDataParallelConfig(use_distributed_optimizer=layout.distributed_optimizer)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    models: list[Any] = GPTModelBuilder(config).build_distributed_models(groups, wrap)
    return [model.train() for model in models]


def _transformer(layout: Layout, case: Case, batched_messages: bool) -> TransformerConfig:
    overlap = layout.virtual is not None and not batched_messages
    options: dict[str, Any] = dict(RECOMPUTE[layout.recompute])
    if case.stage == "moe":
        options |= {
            "num_moe_experts": EXPERTS,
            "moe_ffn_hidden_size": 8,
            "moe_router_topk": 2,
            "moe_layer_freq": [0] * DENSE + [1] * (LAYERS - DENSE),
            "moe_router_load_balancing_type": "none",
            "moe_router_dtype": "fp32",
            # ten times a recipe's: the losses' gradients must stand out
            "moe_aux_loss_coeff": 0.1,
            "moe_z_loss_coeff": 0.03,
            "moe_token_dispatcher_type": layout.dispatcher,
            "expert_model_parallel_size": layout.expert,
            "expert_tensor_parallel_size": layout.expert_tensor,
        }
        if layout.recompute == "selective":
            options["recompute_modules"] = ["core_attn", "mlp", "moe"]
    return transformer_config(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        add_qkv_bias=case.qkv_bias,
        init_method_std=INIT_STD,
        tensor_model_parallel_size=layout.tensor,
        sequence_parallel=layout.tensor > 1 and layout.sequence,
        pipeline_model_parallel_size=layout.pipeline,
        pipeline_dtype=torch.float32,
        virtual_pipeline_model_parallel_size=layout.virtual,
        num_layers_in_first_pipeline_stage=layout.first_stage_layers,
        overlap_p2p_comm=overlap,
        batch_p2p_comm=not overlap,
        finalize_model_grads_func=finalize_model_grads,
        **options,
    )


@torch.no_grad()
def disturb(model: torch.nn.Module) -> None:
    """Move what starts constant (norms, biases, masks, lambdas) away from it, so that an error in it shows."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        if name.endswith("log_alpha"):
            parameter += 1.5 * torch.randn(parameter.shape, generator=generator) - 2.0
    for gate in (*parts(model, HardConcreteGate), *parts(model, MaskGate)):
        if not gate.controller.uses_budget:
            gate.controller.lambdas.copy_(torch.tensor([0.4, 0.9]))


def batches(layout: Layout, iteration: int, rank: int, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the micro-batches of a data-parallel rank: the same B sequences in every layout."""
    generator = torch.Generator().manual_seed(1000 + iteration)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQUENCE + 1), generator=generator)
    loss_mask = torch.ones(BATCH, SEQUENCE)
    for row in range(BATCH):  # as many masked tokens in each sequence, so that micro-batches weigh the same
        loss_mask[row, torch.randperm(SEQUENCE, generator=generator)[:3]] = 0.0
    own = torch.arange(BATCH).chunk(size)[rank]
    for rows in own.split(layout.micro_batch):
        yield {
            "tokens": tokens[rows, :-1].contiguous(),
            "labels": tokens[rows, 1:].contiguous(),
            "loss_mask": loss_mask[rows],
            "position_ids": torch.arange(SEQUENCE).expand(len(rows), SEQUENCE).contiguous(),
        }

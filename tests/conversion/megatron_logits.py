"""Load checkpoints into real Megatron models and write their logits; run as a process of its own.

Usage: python megatron_logits.py JOBS.json OUT.pt, where JOBS.json lists {"name", "checkpoint", "ids"}.
The process patches torch for the CPU (`runtime/cpu.py`), so it is not the process of the other tests.
"""

import json
import sys

from megatron_l0moe.runtime import cpu

cpu.install()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.validation import StrictHandling  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.safe_globals import register_safe_globals  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_l0moe.modules.dsmoe import BlockGateConfig  # noqa: E402
from megatron_l0moe.modules.hard_concrete import HardConcreteConfig  # noqa: E402
from megatron_l0moe.modules.layer_specs import LayerPlan, block_spec  # noqa: E402
from megatron_l0moe.modules.mixture_of_masks import MaskConfig  # noqa: E402
from megatron_l0moe.modules.retention import RetentionConfig  # noqa: E402
from megatron_l0moe.modules.router import RouterConfig  # noqa: E402


def build(args, settings, parallel=None):
    moe = settings["stage"] == "moe"
    extra = {}
    if moe:
        extra = {
            "num_moe_experts": args.num_experts,
            "moe_router_topk": args.moe_router_topk,
            "moe_router_pre_softmax": args.moe_router_pre_softmax,
            "moe_ffn_hidden_size": args.moe_ffn_hidden_size,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "allgather",
            "moe_router_dtype": "fp32",
        }
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        layernorm_epsilon=args.norm_epsilon,
        normalization=args.normalization,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        moe_layer_freq=getattr(args, "moe_layer_freq", [0] * args.num_layers),
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        transformer_impl="local",
        **extra,
        **(parallel or {}),
    )
    plan = LayerPlan(
        stage=settings["stage"],
        dense_layers=settings.get("dense_layers", args.num_layers),
        gate=HardConcreteConfig(),
        retention=RetentionConfig(l0_retention_control="lagrangian"),
        router=RouterConfig(),
        blocks=BlockGateConfig(**{key: settings[key] for key in settings if key.startswith("l0_block")}),
        masks=MaskConfig(**{key: settings[key] for key in settings if key.startswith("l0_masks")}),
    )
    return GPTModel(
        config,
        block_spec(config, plan),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
    )


def run(job):
    checkpoint = job["checkpoint"]
    common = dist_checkpointing.load_common_state_dict(checkpoint)
    model = build(common["args"], common["l0moe"]).eval()
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    wanted = {"model": model.sharded_state_dict(metadata=metadata)}
    strict = StrictHandling.RETURN_ALL
    state, not_asked_for, not_in_checkpoint = dist_checkpointing.load(wanted, checkpoint, strict=strict)
    lacking = {key for key in not_in_checkpoint if ".router.expert_load." not in key}  # counters of training
    assert not lacking, lacking
    surplus = {key for key in not_asked_for if "_extra_state" not in key}
    assert not surplus, surplus
    result = model.load_state_dict(state["model"], strict=False)
    assert all(".router.expert_load." in key for key in result.missing_keys), result
    ids = torch.tensor(job["ids"])
    length = ids.shape[1]
    positions = torch.arange(length).expand_as(ids)
    causal = torch.ones(length, length).triu(1).bool()[None, None]
    with torch.no_grad():
        return model(ids, positions, causal).float()


def main():
    register_safe_globals()
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    with cpu.one_process_group():
        torch.save({job["name"]: run(job) for job in jobs}, sys.argv[2])


if __name__ == "__main__":
    main()

"""Tokens a second and MFU of a training step, by the formulas of `l0moe plan`."""

import argparse
import logging

from megatron_l0moe.runtime.gpus import gpu_name
from megatron_l0moe.sizes.architecture import Architecture
from megatron_l0moe.sizes.flops import Recompute, stage_model, training_flops
from megatron_l0moe.sizes.gpu_models import gpu_of_device
from megatron_l0moe.training.arguments import Settings

logger = logging.getLogger(__name__)


class Throughput:
    """Speed of the whole job; MFU is null where no peak is known, which is said once."""

    def __init__(self, args: argparse.Namespace, settings: Settings) -> None:
        self._peak: float | None = None
        name = gpu_name()
        gpu = gpu_of_device(name) if name else None
        if settings.plan.stage in ("dense", "dsmoe", "mom"):
            logger.warning(
                "MFU is not recorded: the FLOPs of the stage %s are not counted.", settings.plan.stage
            )
        elif gpu is None:
            reason = f"the peak of {name} is not known" if name else "there is no GPU"
            logger.warning("MFU is not recorded: %s.", reason)
        else:
            self._peak = args.world_size * gpu.bf16_flops
            self._flops = flops_per_token(args, settings)

    def of_step(self, tokens: int, seconds: float) -> dict[str, float | None]:
        """Return `tokens_per_second` of all GPUs together, and `mfu`: the share of their peak in bf16."""
        rate = tokens / seconds
        mfu = None if self._peak is None else round(rate * self._flops / self._peak, 5)
        return {"tokens_per_second": round(rate, 2), "mfu": mfu}


def flops_per_token(args: argparse.Namespace, settings: Settings) -> float:
    """Return the FLOPs that a training token needs, forward and backward; what is recomputed does not count.

    `args` are Megatron's, the stage is `expert` or `moe`.
    """
    stage = settings.plan.stage
    assert stage in ("expert", "moe"), "the caller has checked it"
    is_moe = stage == "moe"
    architecture = Architecture(
        family="qwen2" if args.add_qkv_bias else "llama",
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        head_dim=args.kv_channels,
        vocab_size=args.padded_vocab_size,
        rms_norm_eps=1e-5,  # this and RoPE's base cost nothing
        rotary_base=10000.0,
        rope_scaling=None,
        tied_embeddings=not args.untie_embeddings_and_output_weights,
        qkv_bias=args.add_qkv_bias,
        max_position_embeddings=args.max_position_embeddings,
    )
    model = stage_model(
        architecture,
        stage,
        dense_layers=settings.plan.dense_layers,
        num_experts=args.num_experts if is_moe else 1,
        expert_ffn=args.moe_ffn_hidden_size if is_moe else args.ffn_hidden_size,
        top_k=args.moe_router_topk if is_moe else 1,
        trains_weights=settings.stage.l0_train_weights == "on",
    )
    return training_flops(model, args.seq_length, Recompute()).model

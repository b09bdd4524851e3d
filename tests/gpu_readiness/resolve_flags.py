"""Resolve rendered commands to Megatron's configs, by Megatron's own parser and checks.

    python resolve_flags.py te|gpu|cpu < jobs.json

`te` and `gpu` tell `runtime/platform.py` that there is CUDA, with and without Transformer Engine (the fake one, on
PYTHONPATH); what Megatron asks of a device is answered by the stand-ins of `runtime/cpu.py`. The input is a list of
[WORLD_SIZE, flags]; the output a list of dictionaries.
"""

import json
import os
import sys
from typing import Any

from megatron_l0moe.runtime import cpu

cpu.install()

from megatron.core import num_microbatches_calculator as micro_batches  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402
from megatron.training.arguments import parse_args, validate_args  # noqa: E402

from megatron_l0moe.recipe.layout_rules import check_layout  # noqa: E402
from megatron_l0moe.runtime import platform  # noqa: E402
from megatron_l0moe.training import arguments  # noqa: E402
from megatron_l0moe.training.model import model_config  # noqa: E402

ARGUMENTS = (
    *("world_size", "data_parallel_size", "transformer_impl", "distributed_backend"),
    *("train_iters", "global_batch_size", "seq_length", "save_interval", "save_retain_interval"),
    *("lr_warmup_iters", "lr_decay_style", "lr_wsd_decay_style", "lr_wsd_decay_iters"),
)
MODEL = (
    *(
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "add_qkv_bias",
    ),
    *(
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "sequence_parallel",
        "context_parallel_size",
    ),
    *("expert_model_parallel_size", "expert_tensor_parallel_size", "num_moe_experts", "moe_ffn_hidden_size"),
    *(
        "moe_router_topk",
        "moe_grouped_gemm",
        "moe_permute_fusion",
        "moe_token_dispatcher_type",
        "moe_layer_freq",
    ),
    *("moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_pre_softmax"),
    *("bf16", "apply_rope_fusion", "bias_activation_fusion", "gradient_accumulation_fusion", "normalization"),
    *("recompute_granularity", "recompute_method", "recompute_num_layers", "use_cpu_initialization"),
    *("hidden_dropout", "attention_dropout", "hetereogenous_dist_checkpoint"),
)
DDP = ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather", "grad_reduce_in_fp32")
OPTIMIZER = (
    "optimizer",
    "use_distributed_optimizer",
    "bf16",
    "clip_grad",
    "weight_decay",
    "adam_beta2",
    "lr",
)
CHECKPOINT = ("ckpt_format", "dist_ckpt_optim_fully_reshardable", "fully_parallel_save", "save_interval")


def resolve(world_size: int, flags: list[str]) -> dict[str, Any]:
    """Return what one command makes of Megatron, as `training/pretrain.py` would see it."""
    os.environ |= {"WORLD_SIZE": str(world_size), "RANK": "0", "LOCAL_RANK": "0"}
    sys.argv = ["pretrain", *flags]
    arguments.install_argv()
    args = parse_args(arguments.add_l0_arguments)
    sizes = arguments.sizes_from_args(args, has_gpu=platform.has_cuda())
    check_layout(arguments.layout_from_args(args), sizes, arguments.FLAG_NAMES)
    validate_args(args, {})
    settings = arguments.settings_from_args(args)
    config = model_config(args, settings)
    container = pretrain_cfg_container_from_args(args, config)
    micro_batches.init_num_microbatches_calculator(
        args.rank, None, args.global_batch_size, args.micro_batch_size, args.data_parallel_size
    )
    found = {"micro_batches": micro_batches.get_num_microbatches(), "stage": settings.plan.stage}
    micro_batches.unset_num_microbatches_calculator()
    for source, names in ((args, ARGUMENTS), (config.transformer, MODEL)):
        found |= {name: getattr(source, name) for name in names}
    for part, source, names in (
        ("ddp", container.ddp, DDP),
        ("optimizer", container.optimizer, OPTIMIZER),
        ("checkpoint", container.checkpoint, CHECKPOINT),
    ):
        found |= {f"{part}.{name}": getattr(source, name) for name in names}
    return found


def main() -> None:
    machine = sys.argv[1]
    platform.has_cuda = lambda: machine != "cpu"  # type: ignore[assignment]
    jobs = json.load(sys.stdin)
    found = [resolve(world_size, flags) for world_size, flags in jobs]
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

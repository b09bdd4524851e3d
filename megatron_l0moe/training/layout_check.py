"""The layout of a torchrun command, checked before Megatron's own checks and before any process group is made.

Megatron asserts most of these rules, some of them only while it builds the model. Here they are one sentence each.
"""

import argparse
from pathlib import Path
from typing import Any

from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.training.arguments import parse_args

from megatron_l0moe.index.index import check_batching, load_header
from megatron_l0moe.recipe.layout import Layout
from megatron_l0moe.recipe.layout_rules import JobSizes, check_layout
from megatron_l0moe.runtime.cpu import has_cuda
from megatron_l0moe.training.arguments import add_l0_arguments

FLAG_NAMES = {
    "processes": "WORLD_SIZE",
    "tensor": "--tensor-model-parallel-size",
    "sequence": "--sequence-parallel",
    "pipeline": "--pipeline-model-parallel-size",
    "virtual_pipeline": "--num-virtual-stages-per-pipeline-rank",
    "pipeline_layers": "--pipeline-model-parallel-layout",
    "overlap_p2p": "--no-overlap-p2p-communication",
    "expert": "--expert-model-parallel-size",
    "expert_tensor": "--expert-tensor-parallel-size",
    "context": "--context-parallel-size",
    "experts": "--num-experts",
    "expert_ffn": "--moe-ffn-hidden-size",
    "seq_length": "--seq-length",
    "micro_batch": "--micro-batch-size",
    "global_batch": "--global-batch-size",
}
UNEVEN_FLAGS = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


def check_command_line() -> None:
    """Refuse a layout that cannot work, from `sys.argv` and torchrun's WORLD_SIZE.

    Raises:
        L0MoEError: one sentence with the numbers, and the nearest layout that works.
    """
    check_args(parse_args(add_l0_arguments), has_gpu=has_cuda())


def check_args(args: argparse.Namespace, *, has_gpu: bool) -> None:
    """Check what Megatron's parser returned, before `validate_args` has completed it."""
    layout = layout_from_args(args)
    check_layout(layout, sizes_from_args(args, has_gpu=has_gpu), FLAG_NAMES)
    if args.l0_data_index and args.global_batch_size and args.micro_batch_size:
        check_batching(
            load_header(Path(args.l0_data_index)),
            global_batch_size=args.global_batch_size,
            micro_batch_size=args.micro_batch_size,
            data_parallel_size=layout.data,
        )


def layout_from_args(args: argparse.Namespace) -> Layout:
    """Return the layout that the flags ask for."""
    return Layout(
        processes=args.world_size,
        tensor=args.tensor_model_parallel_size,
        sequence=args.sequence_parallel,
        pipeline=args.pipeline_model_parallel_size,
        virtual_pipeline=_virtual_pipeline(args),
        uneven=bool(args.pipeline_model_parallel_layout) or any(getattr(args, name) for name in UNEVEN_FLAGS),
        overlap_p2p=args.overlap_p2p_comm,
        expert=args.expert_model_parallel_size,
        expert_tensor=args.expert_tensor_parallel_size,
        context=args.context_parallel_size,
        distributed_optimizer=args.use_distributed_optimizer,
    )


def sizes_from_args(args: argparse.Namespace, *, has_gpu: bool) -> JobSizes:
    """Return the sizes that the layout has to divide; what a checkpoint or a default decides stays None."""
    return JobSizes(
        layers=args.num_layers,
        heads=args.num_attention_heads,
        query_groups=args.num_query_groups if args.group_query_attention else None,
        ffn=args.ffn_hidden_size,
        vocab=args.vocab_size if args.tokenizer_type == "NullTokenizer" else None,
        vocab_multiple=args.make_vocab_size_divisible_by,
        experts=args.num_experts or 0,
        expert_ffn=args.moe_ffn_hidden_size or args.ffn_hidden_size,
        seq_length=args.seq_length,
        micro_batch=args.micro_batch_size,
        global_batch=args.global_batch_size,
        has_gpu=has_gpu,
    )


def _virtual_pipeline(args: Any) -> int:
    if args.pipeline_model_parallel_layout:
        stages = PipelineParallelLayerLayout.get_num_stages_from_str(args.pipeline_model_parallel_layout)
        return max(int(stages) // int(args.pipeline_model_parallel_size), 1)
    if args.num_virtual_stages_per_pipeline_rank:
        return int(args.num_virtual_stages_per_pipeline_rank)
    if args.num_layers_per_virtual_pipeline_stage and args.num_layers:
        in_one_stage = args.pipeline_model_parallel_size * args.num_layers_per_virtual_pipeline_stage
        return max(int(args.num_layers) // int(in_one_stage), 1)
    return 1

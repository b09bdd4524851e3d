"""Our command-line flags, all `--l0-...`, beside Megatron's own; the only file that sees argparse's namespace whole.

The layout of the command is checked before Megatron's own checks and before any process group is made: Megatron asserts
most of these rules, some of them only while it builds the model. Here they are one sentence each.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import parse_and_validate_args, parse_args

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.index.index import check_batching, load_header
from megatron_l0moe.modules.dsmoe import BlockGateConfig
from megatron_l0moe.modules.hard_concrete import HardConcreteConfig
from megatron_l0moe.modules.layer_specs import LayerPlan
from megatron_l0moe.modules.mixture_of_masks import MaskConfig
from megatron_l0moe.modules.retention import RetentionConfig
from megatron_l0moe.modules.router import RouterConfig
from megatron_l0moe.recipe.layout import FLAGS, Layout
from megatron_l0moe.recipe.layout_rules import JobSizes, check_layout
from megatron_l0moe.runtime.cpu import has_cuda
from megatron_l0moe.runtime.platform import platform_flags


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What this job trains, on which data, and how fast its own parameters learn."""

    l0_stage: Literal["dense", "expert", "moe", "dsmoe", "mom"] = "dense"
    """dense: the base model. expert: masks and MLPs of one domain. moe: the merged L0-MoE. dsmoe: DSMoE. mom:
    Mixture-of-Masks."""
    l0_dense_layers: int = 0
    """Bottom layers that stay dense."""
    l0_data_index: str = ""
    """Prefix of the sample index to train on: PREFIX.ccm.json and its .npy files."""
    l0_metrics_file: str = ""
    """File to which one JSON object is appended after each step; empty for none."""
    l0_stop_file: str = ""
    """Save a checkpoint and end, with exit code 75, after the step in which this file is there; how a job ended early
    is written beside it (`stopped`, `failure.json`). Empty for none."""
    l0_domain_load_interval: int = 10
    """Steps from one record of the experts' load by domain to the next; 0 for none."""
    l0_gpu_sample_seconds: float = 30.0
    """Seconds from one sample of power, memory and clocks of the GPUs to the next; 0 for none."""
    l0_mask_lr: float = 0.3
    """Learning rate of log_alpha."""
    l0_lambda_lr: float = 0.3
    """Learning rate of the lambdas of eq. 2, for gradient ascent."""
    l0_router_lr: float = 0.0
    """Learning rate of the routers, MoM's too, and of DSMoE's gates; 0 means that of the other weights."""
    l0_train_weights: Literal["on", "off"] = "on"
    """off: the expert stage trains the masks only, so that an expert is a list of FFN channels of the dense model."""

    def __post_init__(self) -> None:
        if self.l0_dense_layers < 0:
            raise ValueError(f"l0_dense_layers must be at least 0, got {self.l0_dense_layers}")
        for name in ("l0_domain_load_interval", "l0_gpu_sample_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


ARGUMENT_GROUPS: tuple[tuple[str, type], ...] = (
    ("L0 stage", StageConfig),
    ("L0 gates", HardConcreteConfig),
    ("L0 retention", RetentionConfig),
    ("L0 router", RouterConfig),
    ("L0 blocks of DSMoE", BlockGateConfig),
    ("L0 masks of MoM", MaskConfig),
)


@dataclass(frozen=True)
class JobSettings:
    """All of our settings of one job."""

    stage: StageConfig
    plan: LayerPlan


def add_l0_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our flags to Megatron's parser."""
    for title, config in ARGUMENT_GROUPS:
        ArgumentGroupFactory(config).build_group(parser, title=title)
    return parser


def parse_beside_training(config: type, title: str) -> tuple[argparse.Namespace, Any, JobSettings]:
    """Parse the command line of a program that computes with a model and trains nothing.

    Args:
        config: dataclass of the program's own flags.
        title: of these flags in --help.

    Returns:
        Megatron's arguments, the program's config, our settings.
    """

    def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        ArgumentGroupFactory(config).build_group(parser, title=title)
        return add_l0_arguments(parser)

    install_argv()
    args = parse_and_validate_args(
        extra_args_provider=add_arguments,
        args_defaults={"finetune": True, "no_load_optim": True, "no_load_rng": True},
    )
    return args, config_from_args(config, args), settings_from_args(args)


def config_from_args(config: type, args: argparse.Namespace) -> Any:
    """Build one of our configs; a name that is missing from the namespace raises AttributeError."""
    return config(**{field.name: getattr(args, field.name) for field in fields(config)})


def settings_from_args(args: argparse.Namespace) -> JobSettings:
    """Build and check all of our settings."""
    try:
        stage, gate, retention, router, blocks, masks = (
            config_from_args(config, args) for _, config in ARGUMENT_GROUPS
        )
    except ValueError as error:
        raise L0MoEError(f"{error}.") from error
    plan = LayerPlan(
        stage=stage.l0_stage,
        dense_layers=stage.l0_dense_layers,
        gate=gate,
        retention=retention,
        router=router,
        blocks=blocks,
        masks=masks,
    )
    _check(args, stage, retention)
    if stage.l0_stage == "dsmoe":
        _check_blocks(args, stage, blocks)
    if stage.l0_stage == "mom":
        _check_masks(args, stage, plan)
    return JobSettings(stage, plan)


def _check(args: argparse.Namespace, stage: StageConfig, retention: RetentionConfig) -> None:
    if stage.l0_dense_layers > args.num_layers:
        raise L0MoEError(
            f"--l0-dense-layers ({stage.l0_dense_layers}) must be at most --num-layers ({args.num_layers})."
        )
    if stage.l0_stage == "expert":
        width, ffn = retention.l0_expert_ffn, args.ffn_hidden_size
        if not 1 <= width <= ffn:
            raise L0MoEError(f"--l0-expert-ffn ({width}) must lie between 1 and --ffn-hidden-size ({ffn}).")
        if args.fp16 or args.calculate_per_token_loss:
            raise L0MoEError(
                "The expert stage scales its penalty by the number of micro-batches, so it takes neither --fp16 nor "
                "--calculate-per-token-loss; use --bf16."
            )
        if args.overlap_grad_reduce:
            raise L0MoEError(
                "--overlap-grad-reduce needs a gradient for every parameter in every step, which open and frozen gates "
                "do not have; remove it."
            )
        if stage.l0_train_weights == "off" and retention.l0_freeze_fraction == 0:
            raise L0MoEError(
                "--l0-train-weights off needs --l0-freeze-fraction above 0, because an expert is then a list of units, "
                "which has no place for the gates' values."
            )
        if retention.l0_retention_control == "budget" and retention.l0_freeze_fraction == 0:
            raise L0MoEError(
                "--l0-freeze-fraction 0 needs --l0-retention-control lagrangian, because the budget's gates are those "
                "of a shifted log_alpha, which is not stored; raise it, or take lagrangian."
            )
        _check_steps(args.train_iters, retention)
    if stage.l0_stage == "moe" and args.num_experts is None:
        raise L0MoEError("--l0-stage moe needs --num-experts.")


def _check_blocks(args: argparse.Namespace, stage: StageConfig, blocks: BlockGateConfig) -> None:
    if stage.l0_dense_layers == args.num_layers:
        raise L0MoEError(
            f"--l0-dense-layers ({stage.l0_dense_layers}) must be below --num-layers ({args.num_layers}) for "
            "--l0-stage dsmoe, or no layer has blocks."
        )
    if args.ffn_hidden_size % blocks.l0_blocks:
        divisors = [n for n in range(2, args.ffn_hidden_size + 1) if args.ffn_hidden_size % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - blocks.l0_blocks))
        raise L0MoEError(
            f"--l0-blocks ({blocks.l0_blocks}) must divide --ffn-hidden-size ({args.ffn_hidden_size}), since "
            f"blocks are of equal width; the nearest that does is {nearest}."
        )
    if args.num_experts is not None:
        raise L0MoEError(
            f"--l0-stage dsmoe cuts the dense layers into blocks and takes no --num-experts "
            f"({args.num_experts}); remove it."
        )
    if args.calculate_per_token_loss:
        raise L0MoEError(
            "The dsmoe stage scales its sparsity loss by the number of micro-batches, so it does not take "
            "--calculate-per-token-loss; remove it."
        )


def _check_masks(args: argparse.Namespace, stage: StageConfig, plan: LayerPlan) -> None:
    retention = plan.retention
    if stage.l0_dense_layers == args.num_layers:
        raise L0MoEError(
            f"--l0-dense-layers ({stage.l0_dense_layers}) must be below --num-layers ({args.num_layers}) for "
            "--l0-stage mom, or no layer has masks."
        )
    if args.num_experts is not None:
        raise L0MoEError(
            f"--l0-stage mom masks the dense layers and takes no --num-experts ({args.num_experts}); remove it and "
            "give --l0-masks."
        )
    if args.fp16 or args.calculate_per_token_loss:
        raise L0MoEError(
            "The mom stage scales its penalty by the number of micro-batches, so it takes neither --fp16 nor "
            "--calculate-per-token-loss; use --bf16."
        )
    if args.overlap_grad_reduce:
        raise L0MoEError(
            "--overlap-grad-reduce needs a gradient for every parameter in every step, which open and frozen masks do "
            "not have; remove it."
        )
    if retention.l0_retention_control == "budget":
        raise L0MoEError(
            "--l0-retention-control budget shifts the gates of one mask and cannot hold the activated fraction of "
            "several; --l0-stage mom takes --l0-retention-control lagrangian."
        )
    if stage.l0_train_weights == "off":
        raise L0MoEError(
            "--l0-train-weights off is for the expert stage, and --l0-stage mom trains weights and masks together; "
            "remove it."
        )
    if retention.l0_freeze_fraction == 0:
        raise L0MoEError(
            "--l0-stage mom needs --l0-freeze-fraction above 0, because an export has no place for masks between 0 "
            "and 1."
        )
    if plan.masks.l0_masks_target * args.ffn_hidden_size < 1:
        raise L0MoEError(
            f"--l0-masks-target ({plan.masks.l0_masks_target}) must be at least one channel of --ffn-hidden-size "
            f"({args.ffn_hidden_size}), that is 1 / {args.ffn_hidden_size}."
        )
    _check_steps(args.train_iters, retention)


def _check_steps(steps: int | None, retention: RetentionConfig) -> None:
    if steps is None:
        return
    freeze = steps - round(steps * retention.l0_freeze_fraction)
    if not 1 <= retention.l0_open_steps < freeze:
        raise L0MoEError(
            f"--train-iters ({steps}) with --l0-open-steps ({retention.l0_open_steps}) and --l0-freeze-fraction "
            f"({retention.l0_freeze_fraction}) leaves no step between open gates and the freeze; train longer "
            "(data.tokens_per_expert; of method mom data.tokens_per_set), and keep at least one open step."
        )
    if retention.l0_freeze_fraction and freeze == steps:
        raise L0MoEError(
            f"--l0-freeze-fraction ({retention.l0_freeze_fraction}) of --train-iters ({steps}) is less than one step; "
            "raise one of them."
        )


def with_platform_flags(argv: Sequence[str]) -> list[str]:
    """Return the command line completed by the flags that this machine needs."""
    return [*argv, *platform_flags(argv, moe=any(word.split("=", 1)[0] == "--num-experts" for word in argv))]


def install_argv() -> None:
    """Complete `sys.argv` in place; Megatron's parser reads nothing else."""
    sys.argv[1:] = with_platform_flags(sys.argv[1:])


def settings_as_dict(settings: JobSettings) -> dict[str, Any]:
    """Return the settings that shape the model, as they are stored in checkpoints."""
    values: dict[str, Any] = {
        "version": 1,
        "stage": settings.plan.stage,
        "dense_layers": settings.plan.dense_layers,
    }
    plan = settings.plan
    for config in (plan.gate, plan.retention, plan.router, plan.blocks, plan.masks):
        values.update({field.name: getattr(config, field.name) for field in fields(config)})
    return values


FLAG_NAMES = {
    **{field: f"--{flag}" for field, flag in FLAGS.items()},
    "processes": "WORLD_SIZE",
    "experts": "--num-experts",
    "expert_ffn": "--moe-ffn-hidden-size",
    "seq_length": "--seq-length",
    "micro_batch": "--micro-batch-size",
    "global_batch": "--global-batch-size",
}
READ_BACK = ("tensor", "sequence", "pipeline", "expert", "expert_tensor", "context", "distributed_optimizer")
"""Fields of a layout that Megatron keeps as they are, under their flag's name."""
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
        virtual_pipeline=_virtual_pipeline(args),
        uneven=bool(args.pipeline_model_parallel_layout) or any(getattr(args, name) for name in UNEVEN_FLAGS),
        overlap_p2p=args.overlap_p2p_comm,
        **{field: getattr(args, FLAGS[field].replace("-", "_")) for field in READ_BACK},
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

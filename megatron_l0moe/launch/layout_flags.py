"""Megatron's flags of a parallel layout. Pure text."""

from megatron_l0moe.planning.layouts import Layout
from megatron_l0moe.recipe_sections import Flag

DISTRIBUTED_TIMEOUT_MINUTES = 60


def layout_flags(layout: Layout) -> dict[str, Flag]:
    """Return the flags of a layout, by name without the leading dashes; True stands for a flag without a value."""
    flags: dict[str, Flag] = {
        "tensor-model-parallel-size": layout.tensor,
        "pipeline-model-parallel-size": layout.pipeline,
        "distributed-timeout-minutes": DISTRIBUTED_TIMEOUT_MINUTES,
    }
    if layout.sequence:
        flags["sequence-parallel"] = True
    if layout.expert > 1:
        flags["expert-model-parallel-size"] = layout.expert
    if layout.expert_tensor is not None:
        flags["expert-tensor-parallel-size"] = layout.expert_tensor
    if layout.dispatcher:
        flags["moe-token-dispatcher-type"] = layout.dispatcher
    if layout.context > 1:
        flags["context-parallel-size"] = layout.context
    if layout.distributed_optimizer:
        flags |= {"use-distributed-optimizer": True, "dist-ckpt-optim-fully-reshardable": True}
    return flags | _pipeline(layout)


def _pipeline(layout: Layout) -> dict[str, Flag]:
    flags: dict[str, Flag] = {}
    if layout.pipeline_layers:
        stages = ["t" * layers for layers in layout.pipeline_layers]
        flags["pipeline-model-parallel-layout"] = f"E{'|'.join(stages)}L"  # embedding, layers by stage, loss
    elif layout.virtual_pipeline > 1:
        flags["num-virtual-stages-per-pipeline-rank"] = layout.virtual_pipeline
    if layout.virtual_pipeline > 1 and not layout.overlap_p2p:
        flags["no-overlap-p2p-communication"] = True
    return flags

"""Bytes on disk: checkpoints of training, expert files, the exported model, token files."""

from dataclasses import dataclass

from megatron_l0moe.planning.memory import optimizer_bytes, rank_parameters
from megatron_l0moe.recipe.layout import Layout
from megatron_l0moe.sizes.flops import StageModel

UINT16_IDS = 65500
"""Vocabularies below it are stored in two bytes a token (core/datasets/indexed_dataset.py, optimal_dtype)."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSize:
    """Bytes of one checkpoint of a training job."""

    weights: int
    optimizer: int

    @property
    def total(self) -> int:
        """Both."""
        return self.weights + self.optimizer


def checkpoint_size(model: StageModel, *, bf16: bool) -> CheckpointSize:
    """Return the size of a torch_dist checkpoint, which does not depend on the layout."""
    one = Layout()
    counts = rank_parameters(model, one, 0)
    wide = 2 if bf16 else 4
    return CheckpointSize(
        weights=wide * (counts.dense + counts.experts) + 4 * (counts.gates + counts.gate_buffers),
        optimizer=int(optimizer_bytes(counts, one, bf16=bf16)),
    )


def expert_file_bytes(moe: StageModel, *, bf16: bool, with_weights: bool = True) -> int:
    """Return the size of one expert.safetensors: its weights, the units' numbers (int32) and the input means (fp32)."""
    one = moe.experts_weights // moe.counts.num_experts
    per_layer = 4 * (moe.expert_ffn + moe.architecture.hidden_size)
    return moe.upper_layers * (per_layer + (one * (2 if bf16 else 4) if with_weights else 0))


def token_bytes(vocab_size: int) -> int:
    """Return the bytes of one token in Megatron's .bin files."""
    return 2 if vocab_size < UINT16_IDS else 4

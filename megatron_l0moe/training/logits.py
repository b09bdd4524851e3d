"""Write the logits of a trained Megatron checkpoint on held-out text, for the parity check of the export.

`python -m megatron_l0moe.training.logits [Megatron's flags] --l0-heldout FILE --l0-positions N --l0-logits-file OUT`.
The model is computed in float32 whatever dtype its weights are stored in. OUT is a safetensors file:
`tokens` int64 [N], `logits` float32 [N, vocabulary], `margins` float32 [N]: the smallest relative gap, over the MoE
layers, between the probability of the last expert, or mask, chosen and the first one not chosen; of a DSMoE the
smallest distance of a block's score from the threshold or, where none is above it, of the highest score from the next.
Where that gap is of the size of rounding, two correct programs may choose differently.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_l0moe.checkpoints.torch_dist import CheckpointReader
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.index.heldout_file import check_vocabulary, read_heldout
from megatron_l0moe.runs.caller_environment import for_one_process, for_our_processes, replace
from megatron_l0moe.runs.stage_folder import whole
from megatron_l0moe.runtime import checkpoint_fixes, cpu
from megatron_l0moe.training.pretrain import exit_with_one_sentence


@dataclass(frozen=True, kw_only=True)
class LogitsConfig:
    """Input and output of this command."""

    l0_heldout: str = ""
    """File of held-out sequences, written by curate."""
    l0_positions: int = 64
    """Positions whose logits are written."""
    l0_logits_file: str = ""
    """The safetensors file to write."""


def main() -> None:
    """Load the checkpoint into one process and write the logits."""
    replace(os.environ, for_our_processes(os.environ) | for_one_process())
    cpu.install_training()
    checkpoint_fixes.install()
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training as megatron_training
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.models.gpt import GPTModelBuilder

    from megatron_l0moe.modules.trained_part import TrainedPart, parts
    from megatron_l0moe.training import arguments, checkpoints, model

    args, config, settings = arguments.parse_beside_training(LogitsConfig, "L0 logits")
    checkpoints.check_model(CheckpointReader(Path(args.load)), args, settings, settings.plan.stage)
    tokens = _first_tokens(Path(config.l0_heldout), config.l0_positions)
    check_vocabulary(int(tokens.max()), args.padded_vocab_size)
    megatron_training.initialize_megatron()
    builder = GPTModelBuilder(model.model_config(args, settings))
    gpt = builder.build_model(ProcessGroupCollection.use_mpu_process_groups())
    load_checkpoint([gpt], None, None)
    gpt = gpt.to(cpu.device()).eval()
    logits, margins = _forward(gpt, tokens.to(cpu.device()), list(parts(gpt, TrainedPart)))
    _write(Path(config.l0_logits_file), {"tokens": tokens, "logits": logits.cpu(), "margins": margins.cpu()})
    torch.distributed.destroy_process_group()


@torch.no_grad()
def _forward(gpt: Any, tokens: Tensor, parts: list[Any]) -> tuple[Tensor, Tensor]:
    margins = torch.full((tokens.shape[0],), float("inf"), device=tokens.device)

    def observe(part: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        found = part.margins(inputs[0]) if inputs else None
        if found is not None:
            margins.copy_(torch.minimum(margins, found))

    hooks = [part.register_forward_hook(observe) for part in parts]
    positions = torch.arange(tokens.shape[0], device=tokens.device)
    logits = gpt(tokens[None], positions[None], None)[0].float()
    for hook in hooks:
        hook.remove()
    return logits, margins


def _first_tokens(heldout: Path, positions: int) -> Tensor:
    """Return the first tokens of the first held-out sequence that is long enough; int64 [positions]."""
    longest = 0
    for sequence in read_heldout(heldout):
        tokens = sequence.tokens
        longest = max(longest, len(tokens))
        if len(tokens) >= positions:
            return torch.tensor(tokens[:positions], dtype=torch.int64)
    raise L0MoEError(
        f"No sequence of {heldout} has {positions} tokens (the longest has {longest}); "
        "lower evaluation.parity_positions."
    )


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    with whole(file) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)


if __name__ == "__main__":
    exit_with_one_sentence(main)

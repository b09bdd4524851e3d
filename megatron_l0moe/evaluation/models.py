"""Loading Hugging Face checkpoints for evaluation: plain AutoModelForCausalLM, no code from the checkpoint."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megatron_l0moe.errors import L0MoEError

logger = logging.getLogger(__name__)

EXPERTS_IMPLEMENTATION = "grouped_mm"
"""How transformers computes the experts; the choice and its measurement are in docs/evaluate.md."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(
    folder: Path,
    *,
    dtype: str = "float32",
    device: torch.device | None = None,
    experts_implementation: str = EXPERTS_IMPLEMENTATION,
) -> PreTrainedModel:
    """Load a checkpoint folder for inference, from disk only.

    Args:
        folder: config.json and safetensors; dense or an exported L0-MoE.
        dtype: float32 or bfloat16 (routers stay in float32 where the model class says so).
        device: where the weights go; None: the default device.
        experts_implementation: eager, grouped_mm or batched_mm; without meaning for a dense model.

    Raises:
        L0MoEError: no checkpoint there, or its weights do not fill the model exactly.
    """
    if not (folder / "config.json").is_file():
        raise L0MoEError(f"{folder} holds no config.json; give the folder of a Hugging Face checkpoint.")
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # a dense model class refuses the setting
    experts = {"experts_implementation": experts_implementation} if hasattr(config, "num_experts") else {}
    loaded: tuple[Any, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=DTYPES[dtype],
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        **experts,
    )
    model, info = loaded
    # Qwen2-MoE without shared experts has weights of size 0, which no file holds.
    empty = {name for name, weight in model.named_parameters() if not weight.numel()}
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted({str(key) for key in info.get(problem) or ()} - empty):
            raise L0MoEError(
                f"Checkpoint {folder} does not fill its model: {len(keys)} {problem.replace('_', ' ')}, "
                f"the first is {keys[0]}; export it again."
            )
    result: PreTrainedModel = model.eval() if device is None else model.eval().to(device)
    return result

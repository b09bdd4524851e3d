"""Loading Hugging Face checkpoints for evaluation: plain AutoModelForCausalLM, no code that is not ours.

The modelling file of an exported DSMoE is run only where it is, byte for byte, the one that `export` writes.
"""

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megatron_l0moe.checkpoints.safetensors_files import SafetensorsFolder
from megatron_l0moe.conversion.dsmoe_layout import MODEL_TYPE, MODELLING_FILE, modelling_text
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.sizes.architecture import DENSE_FAMILIES, read_config

logger = logging.getLogger(__name__)


def is_dsmoe(model_type: object) -> bool:
    """Say whether a config.json with this model_type is that of an exported DSMoE."""
    family = str(model_type).removeprefix(MODEL_TYPE)
    return family != model_type and family in DENSE_FAMILIES


def exported_code(folder: Path, model_type: str) -> ModuleType:
    """Import the modelling file of an exported DSMoE, without transformers' copy of it in the user's cache."""
    file = folder / MODELLING_FILE
    ours = modelling_text(model_type.removeprefix(MODEL_TYPE))
    if not file.is_file() or file.read_text(encoding="utf-8", errors="replace") != ours:
        raise L0MoEError(
            f"{file} is not the modelling file that this version exports, and no other code is run here; export the "
            "checkpoint again."
        )
    name = f"{__name__}_{model_type}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # transformers looks up the module of a class by its name
    spec.loader.exec_module(module)
    return module


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
        folder: config.json and safetensors; dense or an export of this project.
        dtype: float32 or bfloat16 (routers stay in float32 where the model class says so).
        device: where the weights go; None: the default device.
        experts_implementation: eager, grouped_mm or batched_mm; without meaning for a dense model.

    Raises:
        L0MoEError: no checkpoint there, or its weights do not fill the model exactly.
    """
    read_config(folder)
    SafetensorsFolder(folder)  # a file that is cut short is said in one sentence
    configs, models = _classes(folder)
    config = configs.from_pretrained(folder, local_files_only=True, **_trust(configs))
    # a dense model class refuses the setting
    experts = {"experts_implementation": experts_implementation} if hasattr(config, "num_experts") else {}
    loaded: tuple[Any, dict[str, Any]] = models.from_pretrained(
        folder,
        config=config,
        dtype=DTYPES[dtype],
        local_files_only=True,
        output_loading_info=True,
        **_trust(configs),
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


def _classes(folder: Path) -> tuple[Any, Any]:
    """Return the classes of config and model: those that transformers finds, or a DSMoE's own."""
    model_type = str(read_config(folder).get("model_type"))
    if not is_dsmoe(model_type):
        return AutoConfig, AutoModelForCausalLM
    module = exported_code(folder, model_type)
    return module.DSMoEConfig, module.DSMoEForCausalLM


def _trust(configs: Any) -> dict[str, bool]:
    """Forbid transformers to look for code; classes that are there already do not ask."""
    return {"trust_remote_code": False} if configs is AutoConfig else {}

"""The modelling file of an exported DSMoE, run only where it is, byte for byte, the one that `export` writes."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from megatron_l0moe.conversion.dsmoe_layout import MODEL_TYPE, MODELLING_FILE, modelling_text
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.sizes.architecture import DENSE_FAMILIES


def is_dsmoe(model_type: object) -> bool:
    """Say whether a config.json with this model_type is that of an exported DSMoE."""
    family = str(model_type).removeprefix(MODEL_TYPE)
    return family != model_type and family in DENSE_FAMILIES


def exported_code(folder: Path, model_type: str) -> ModuleType:
    """Import the modelling file of an exported DSMoE, without transformers' copy of it in the user's cache.

    Raises:
        L0MoEError: the file is missing, or is not ours.
    """
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

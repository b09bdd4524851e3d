"""DSMoE as a Hugging Face checkpoint: tensors, config.json and the modelling file that goes with them.

No architecture that transformers or an engine knows has a number of active experts that differs from token to token, so
the checkpoint brings its own code, a subclass of the dense model's classes (`dsmoe_modelling.py`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_l0moe.checkpoints.families import dense_rules
from megatron_l0moe.checkpoints.rules import Rename, Rule
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.sizes.architecture import DENSE_FAMILIES, Architecture

MODELLING_FILE = "modeling_dsmoe.py"  # the name that transformers' own files have
MODEL_TYPE = "dsmoe_"
"""Beginning of config.json's model_type; the dense family follows."""
_SOURCE = Path(__file__).with_name("dsmoe_modelling.py")


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """What a DSMoE has beside its dense base."""

    dense_layers: int
    blocks: int
    threshold: float

    @classmethod
    def from_settings(cls, settings: dict[str, Any], source: Path) -> "BlockShape":
        """Read the settings of a checkpoint; `source` names it in messages."""
        if settings.get("stage") != "dsmoe":
            raise L0MoEError(
                f"{source} is of the stage {settings.get('stage')!r} and has no blocks; give a checkpoint of "
                "--l0-stage dsmoe."
            )
        return cls(
            dense_layers=settings["dense_layers"],
            blocks=settings["l0_blocks"],
            threshold=settings["l0_block_threshold"],
        )


def dsmoe_rules(architecture: Architecture, shape: BlockShape) -> list[Rule]:
    """Return the dense family's table with the gates' weights."""
    gates = [
        Rename(
            megatron=f"decoder.layers.{layer}.mlp.block_gate.weight",
            hf=f"model.layers.{layer}.mlp.block_gate.weight",
            shape=(shape.blocks, architecture.hidden_size),
        )
        for layer in range(shape.dense_layers, architecture.num_layers)
    ]
    return [*dense_rules(architecture), *gates]


def dsmoe_config(architecture: Architecture, shape: BlockShape, dtype: str) -> dict[str, Any]:
    """Return config.json's dictionary; `auto_map` names the classes of the modelling file."""
    module = MODELLING_FILE.removesuffix(".py")
    return {
        **architecture.hf_config(dtype),
        "architectures": ["DSMoEForCausalLM"],
        "model_type": f"{MODEL_TYPE}{architecture.family}",
        "auto_map": {
            "AutoConfig": f"{module}.DSMoEConfig",
            "AutoModelForCausalLM": f"{module}.DSMoEForCausalLM",
        },
        "num_blocks": shape.blocks,
        "block_threshold": shape.threshold,
        "num_dense_layers": shape.dense_layers,
    }


def modelling_text(dense_family: str) -> str:
    """Return the modelling file for a dense family: its classes are named alike, `Llama` in the one kept here."""
    family = DENSE_FAMILIES[dense_family]
    prefix = family.hf_architecture.removesuffix("ForCausalLM")
    return _SOURCE.read_text(encoding="utf-8").replace("Llama", prefix).replace("llama", family.model_type)

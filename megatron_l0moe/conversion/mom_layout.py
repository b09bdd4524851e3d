"""A frozen Mixture-of-Masks as an Ernie4.5-MoE with shared experts: shape, tensors and config.json.

Of the layouts that stock engines know, it has both a shared FFN that is added as it is and a softmax after top-k.
"""

from dataclasses import dataclass
from typing import Any

from megatron_l0moe.checkpoints.families import MoEShape, ernie_layers
from megatron_l0moe.checkpoints.rules import Rename, Rule, Zeros
from megatron_l0moe.checkpoints.torch_dist import CheckpointReader
from megatron_l0moe.conversion.masked_experts import MaskedExperts
from megatron_l0moe.conversion.moe_layouts import LAYOUTS
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.experts.mask_units import ExpertWidths, MaskUnits, common_widths, sort_units
from megatron_l0moe.sizes.architecture import Architecture


@dataclass(frozen=True, kw_only=True)
class MaskShape:
    """What a frozen Mixture-of-Masks has beside its dense base."""

    dense_layers: int
    masks: int
    top_k: int
    widths: ExpertWidths
    counts: dict[int, dict[str, Any]]
    """By layer: units that are `shared` and `inactive`, and `routed` ones by mask."""

    @classmethod
    def from_checkpoint(
        cls, reader: CheckpointReader, architecture: Architecture, *, multiple: int
    ) -> "MaskShape":
        """Read the masks of a checkpoint.

        Raises:
            L0MoEError: another stage, masks that are not frozen or empty, a base with biases on q, k and v.
        """
        settings = reader.settings
        if settings.get("stage") != "mom":
            raise L0MoEError(
                f"{reader.path} is of the stage {settings.get('stage')!r} and has no masks to choose from; give a "
                "checkpoint of --l0-stage mom."
            )
        if architecture.qkv_bias:
            raise L0MoEError(
                f"{reader.path} has biases on q, k and v, which Ernie4.5-MoE cannot express, and no other stock layout "
                "adds a shared expert as it is; start from a base without them."
            )
        layers = {
            layer: _units(reader, layer) for layer in range(settings["dense_layers"], architecture.num_layers)
        }
        top_k = settings["l0_masks_top_k"]
        return cls(
            dense_layers=settings["dense_layers"],
            masks=settings["l0_masks"],
            top_k=top_k,
            widths=common_widths(list(layers.values()), top_k=top_k, multiple=multiple),
            counts={
                layer: {
                    "shared": len(units.shared),
                    "routed": [len(part) for part in units.routed],
                    "inactive": len(units.inactive),
                }
                for layer, units in layers.items()
            },
        )


def _units(reader: CheckpointReader, layer: int) -> MaskUnits:
    prefix = f"decoder.layers.{layer}.mlp.masks"
    if not bool(reader.read(f"{prefix}.frozen").item()):
        raise L0MoEError(
            f"The masks of {reader.path} are not frozen, so units still have values between 0 and 1; give a checkpoint "
            "of the last steps (--l0-freeze-fraction)."
        )
    return sort_units(reader.read(f"{prefix}.hard_mask"))


def mom_rules(architecture: Architecture, shape: MaskShape) -> list[Rule]:
    """Return the table: Ernie's attention and norms, dense layers first, then masks as experts."""
    a = architecture
    rules = ernie_layers(a, shape.dense_layers)
    for layer in range(shape.dense_layers, a.num_layers):
        hf, megatron = f"model.layers.{layer}", f"decoder.layers.{layer}.mlp"
        rules += [
            Rename(
                megatron=f"{megatron}.linear_fc1.layer_norm_weight",
                hf=f"{hf}.post_attention_layernorm.weight",
                shape=(a.hidden_size,),
            ),
            Rename(
                megatron=f"{megatron}.mask_router.weight",
                hf=f"{hf}.mlp.gate.weight",
                shape=(shape.masks, a.hidden_size),
            ),
            Zeros(hf=f"{hf}.mlp.moe_statics.e_score_correction_bias", shape=(1, shape.masks)),
            MaskedExperts(
                mlp=megatron,
                hf=f"{hf}.mlp",
                masks=shape.masks,
                widths=shape.widths,
                ffn=a.ffn_hidden_size,
                hidden=a.hidden_size,
            ),
        ]
    return rules


def mom_config(architecture: Architecture, shape: MaskShape, dtype: str) -> dict[str, Any]:
    """Return config.json's dictionary."""
    moe = MoEShape(
        dense_layers=shape.dense_layers,
        num_experts=shape.masks,
        expert_ffn=shape.widths.expert,
        top_k=shape.top_k,
    )
    config = LAYOUTS["ernie4_5_moe"].hf_config(architecture, moe, dtype, ["transformers"])
    return {**config, "moe_num_shared_experts": shape.widths.num_shared}

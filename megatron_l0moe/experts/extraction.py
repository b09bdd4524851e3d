"""Cut the expert out of an expert run's checkpoint: exactly E units of every MoE layer, their gates folded in.

F = FFN channels, E = units kept, H = hidden.
"""

import logging
import re
from pathlib import Path

import torch

from megatron_l0moe.conversion.megatron_checkpoint import CheckpointReader
from megatron_l0moe.conversion.safetensors_files import refuse_non_finite
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.experts.expert_file import write_expert
from megatron_l0moe.experts.selection import GateSettings, deterministic_gate, select_units, units_of_mask

logger = logging.getLogger(__name__)

_LOG_ALPHA = re.compile(r"decoder\.layers\.(\d+)\.mlp\.gate\.log_alpha")


def extract_expert(checkpoint: Path, out_file: Path, *, width: int) -> dict[str, object]:
    """Write the expert of a run: in every layer the `width` units of its frozen mask, or of the largest log_alpha.

    A unit's gate z scales its activation silu(gate x) * (up x); it is multiplied into the unit's row of `up`, so that
    the expert needs no mask. After the freeze z is 1 and the weights are copied as they are.

    Args:
        checkpoint: folder with the run's `latest_checkpointed_iteration.txt`.
        out_file: the expert file, replaced when it exists.
        width: E, the same in every layer.

    Returns:
        Numbers for the manifest: width, layers, whether the masks were frozen, the folded gates' range.

    Raises:
        L0MoEError: no such checkpoint, no gates in it, another width, NaN weights, or masks that are not frozen
            though the retention was controlled by the exact budget.
    """
    reader = CheckpointReader(checkpoint)
    layers = sorted(int(match[1]) for name in reader.shapes if (match := _LOG_ALPHA.fullmatch(name)))
    if not layers:
        raise L0MoEError(
            f"{reader.path} has no masks (gate.log_alpha); it is not the checkpoint of an expert run."
        )
    gate = _gate_settings(reader)
    tensors: dict[str, torch.Tensor] = {}
    frozen_layers = 0
    smallest = 1.0
    for layer in layers:
        units, z, frozen = _selection(reader, layer, width, gate)
        frozen_layers += frozen
        smallest = min(smallest, float(z.min()))
        for part, tensor in _layer(reader, layer, units, z).items():
            refuse_non_finite(f"{part} of layer {layer}", tensor)
            tensors[f"layers.{layer}.{part}"] = tensor
    if frozen_layers not in (0, len(layers)):
        raise L0MoEError(
            f"{reader.path}: {frozen_layers} of {len(layers)} masks are frozen; the checkpoint is damaged."
        )
    if not frozen_layers and reader.settings.get("l0_retention_control") == "budget":
        raise L0MoEError(
            f"{reader.path}: the masks are not frozen; train with --l0-freeze-fraction above 0, because with "
            "--l0-retention-control budget the gates are those of a shifted log_alpha, which is not stored."
        )
    write_expert(out_file, tensors, width=width, layers=layers)
    logger.info("extracted %d units in each of %d layers to %s", width, len(layers), out_file)
    return {
        "expert_ffn": width,
        "moe_layers": layers,
        "frozen": frozen_layers > 0,
        "smallest_gate": smallest,
        "parameters": sum(
            tensors[f"layers.{layer}.{part}"].numel() for layer in layers for part in ("gate", "up", "down")
        ),
    }


def _gate_settings(reader: CheckpointReader) -> GateSettings:
    settings, default = reader.settings, GateSettings()
    return GateSettings(
        temperature=float(settings.get("l0_temperature", default.temperature)),
        stretch_low=float(settings.get("l0_stretch_low", default.stretch_low)),
        stretch_high=float(settings.get("l0_stretch_high", default.stretch_high)),
    )


def _selection(
    reader: CheckpointReader, layer: int, width: int, gate: GateSettings
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return the units [E], their gates fp32 [E], and whether the mask was frozen."""
    prefix = f"decoder.layers.{layer}.mlp.gate"
    if bool(reader.read(f"{prefix}.frozen").item()):
        units = units_of_mask(reader.read(f"{prefix}.hard_mask"), width)
        return units, torch.ones(width), True
    log_alpha = reader.read(f"{prefix}.log_alpha")
    units = select_units(log_alpha, width)
    return units, deterministic_gate(log_alpha, gate)[units], False


def _layer(
    reader: CheckpointReader, layer: int, units: torch.Tensor, z: torch.Tensor
) -> dict[str, torch.Tensor]:
    prefix = f"decoder.layers.{layer}.mlp"
    fc1 = reader.read(f"{prefix}.linear_fc1.weight")  # [2F, H], gate then up
    gate, up = fc1.chunk(2)
    down = reader.read(f"{prefix}.linear_fc2.weight")  # [H, F]
    return {
        "gate": gate[units],
        # In fp32 and rounded once; exact where z is 1.
        "up": (up[units].float() * z[:, None]).to(up.dtype),
        "down": down[:, units],
        "units": units,
        "input_mean": reader.read(f"{prefix}.gate.input_mean").float(),
    }

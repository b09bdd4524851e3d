"""Cut the expert out of an expert run's checkpoint: exactly E units of every MoE layer, their gates folded in.

Of a run that trained masks only, the units are all there is to keep: their weights are those of the dense model. How
much the experts' choices overlap is measured here too.

F = FFN channels, E = units kept, H = hidden, K = experts.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_l0moe.checkpoints.safetensors_files import refuse_non_finite
from megatron_l0moe.checkpoints.torch_dist import CheckpointReader
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.experts.expert_file import cut_units, fingerprint, write_expert
from megatron_l0moe.modules.hard_concrete import HardConcreteConfig, deterministic_gate, top_k

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """How alike the K experts of one layer are."""

    iou_matrix: list[list[float]]
    """[K][K] intersection over union of the chosen units."""
    mean_iou: float
    """Mean over the pairs of different experts."""
    coverage: float
    """Fraction of the F units that at least one expert keeps."""


def select_units(log_alpha: torch.Tensor, width: int) -> torch.Tensor:
    """Return the `width` units with the largest log_alpha [F], ties to the lower index; ascending int64 [E]."""
    if log_alpha.isnan().any():
        raise L0MoEError(
            "log_alpha holds NaN; the expert run has diverged, go back to an earlier checkpoint."
        )
    if not 1 <= width <= log_alpha.numel():
        raise L0MoEError(
            f"The expert width ({width}) must be between 1 and the layer's {log_alpha.numel()} FFN units."
        )
    return top_k(log_alpha.float(), width)


def units_of_mask(hard_mask: torch.Tensor, width: int) -> torch.Tensor:
    """Return the units of a frozen 0/1 mask [F] ascending int64 [E]; exactly `width` must be kept."""
    units = hard_mask.nonzero().flatten()
    if units.numel() != width:
        raise L0MoEError(
            f"The frozen mask keeps {units.numel()} units, but the expert width is {width}; use the width "
            "that the expert run was trained for."
        )
    return units


def overlap(units: Sequence[torch.Tensor], num_units: int) -> Overlap:
    """Compare the units of K experts of one layer that has `num_units` (F) in all."""
    kept = torch.zeros(len(units), num_units, dtype=torch.float64)
    for k, chosen in enumerate(units):
        kept[k, chosen] = 1.0
    shared = kept @ kept.T  # [K, K] sizes of the intersections
    sizes = kept.sum(1)
    iou = shared / (sizes[:, None] + sizes[None, :] - shared)
    pairs = iou[~torch.eye(len(units), dtype=torch.bool)]
    return Overlap(
        iou_matrix=iou.tolist(),
        mean_iou=float(pairs.mean()) if pairs.numel() else 1.0,
        coverage=float((kept.sum(0) > 0).double().mean()),
    )


def chance_iou(width: int, num_units: int) -> float:
    """Return the IoU of two random choices of E units out of F: p / (2 - p) with p = E / F."""
    share = width / num_units
    return share / (2.0 - share)


_SETTINGS = (
    *("l0_temperature", "l0_stretch_low", "l0_stretch_high"),
    *("l0_train_weights", "l0_retention_control"),
)
_LOG_ALPHA = re.compile(r"decoder\.layers\.(\d+)\.mlp\.gate\.log_alpha")


def extract_expert(checkpoint: Path, out_file: Path, *, width: int) -> dict[str, object]:
    """Write the expert of a run: in every layer the `width` units of its frozen mask, or of the largest log_alpha.

    A unit's gate z is multiplied into its row of `up`, so that the expert needs no mask. After the freeze z is 1 and
    the weights are copied as they are; with --l0-train-weights off they are left out.

    Args:
        checkpoint: folder with the run's `latest_checkpointed_iteration.txt`.
        out_file: the expert file, replaced when it exists.
        width: E, the same in every layer.

    Returns:
        Numbers for the manifest: width, layers, whether the masks were frozen, the folded gates' range, whether the
        file holds weights, its bytes, the expert's parameters.

    Raises:
        L0MoEError: no such checkpoint, no gates or L0 settings in it, another width, NaN weights, or masks that are not
            frozen though the retention was controlled by the exact budget or the weights were not trained.
    """
    reader = CheckpointReader(checkpoint)
    layers = sorted(int(match[1]) for name in reader.shapes if (match := _LOG_ALPHA.fullmatch(name)))
    if not layers:
        raise L0MoEError(
            f"{reader.path} has no masks (gate.log_alpha); it is not the checkpoint of an expert run."
        )
    settings = _settings(reader)
    gate, with_weights = _gate_settings(settings), settings["l0_train_weights"] == "on"
    tensors: dict[str, torch.Tensor] = {}
    fingerprints: dict[int, str] = {}
    parameters = 0
    frozen_layers = 0
    smallest = 1.0
    for layer in layers:
        units, z, frozen = _selection(reader, layer, width, gate)
        frozen_layers += frozen
        smallest = min(smallest, float(z.min()))
        weights, digest = _weights(reader, layer, units, z)
        parameters += sum(tensor.numel() for tensor in weights.values())
        parts = {"units": units.int(), "input_mean": reader.read(_gate(layer, "input_mean")).float()}
        if with_weights:
            parts |= weights
        else:
            fingerprints[layer] = digest
        tensors |= {f"layers.{layer}.{part}": tensor for part, tensor in parts.items()}
    if frozen_layers not in (0, len(layers)):
        raise L0MoEError(
            f"{reader.path}: {frozen_layers} of {len(layers)} masks are frozen; the checkpoint is damaged."
        )
    if not frozen_layers:
        _refuse_open_masks(reader.path, settings, with_weights)
    write_expert(out_file, tensors, width=width, layers=layers, fingerprints=fingerprints or None)
    logger.info("extracted %d units in each of %d layers to %s", width, len(layers), out_file)
    return {
        "expert_ffn": width,
        "moe_layers": layers,
        "frozen": frozen_layers > 0,
        "smallest_gate": smallest,
        "weights": with_weights,
        "bytes": out_file.stat().st_size,
        "parameters": parameters,
    }


def _refuse_open_masks(path: Path, settings: dict[str, Any], with_weights: bool) -> None:
    """Refuse masks that are not frozen where the gates' values could not be folded into weights."""
    if settings["l0_retention_control"] == "budget":
        raise L0MoEError(
            f"{path}: the masks are not frozen; train with --l0-freeze-fraction above 0, because with "
            "--l0-retention-control budget the gates are those of a shifted log_alpha, which is not stored."
        )
    if not with_weights:
        raise L0MoEError(
            f"{path}: the masks are not frozen; train with --l0-freeze-fraction above 0, because with "
            "--l0-train-weights off an expert is a list of units, which has no place for the gates' values."
        )


def _settings(reader: CheckpointReader) -> dict[str, Any]:
    """Return the run's L0 settings; defaults could be others than what the run used."""
    settings = reader.settings
    if missing := [name for name in _SETTINGS if name not in settings]:
        raise L0MoEError(
            f"The checkpoint {reader.path} holds no L0 settings ({missing[0]} is missing), so nothing says how its "
            "gates are computed; train the expert with this version."
        )
    return settings


def _gate_settings(settings: dict[str, Any]) -> HardConcreteConfig:
    return HardConcreteConfig(
        l0_temperature=float(settings["l0_temperature"]),
        l0_stretch_low=float(settings["l0_stretch_low"]),
        l0_stretch_high=float(settings["l0_stretch_high"]),
    )


def _selection(
    reader: CheckpointReader, layer: int, width: int, gate: HardConcreteConfig
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return the units [E], their gates fp32 [E], and whether the mask was frozen."""
    if bool(reader.read(_gate(layer, "frozen")).item()):
        units = units_of_mask(reader.read(_gate(layer, "hard_mask")), width)
        return units, torch.ones(width), True
    log_alpha = reader.read(_gate(layer, "log_alpha"))
    units = select_units(log_alpha, width)
    return units, deterministic_gate(log_alpha.float(), gate)[units], False


def _weights(
    reader: CheckpointReader, layer: int, units: torch.Tensor, z: torch.Tensor
) -> tuple[dict[str, torch.Tensor], str]:
    """Return the units' weights with their gates folded in, and the fingerprint of the whole MLP."""
    prefix = f"decoder.layers.{layer}.mlp"
    fc1, fc2 = (reader.read(f"{prefix}.linear_{name}.weight") for name in ("fc1", "fc2"))  # [2F, H], [H, F]
    weights = cut_units(fc1, fc2, units, z)
    for part, tensor in weights.items():
        refuse_non_finite(f"{part} of layer {layer}", tensor)
    return weights, fingerprint(fc1, fc2)


def _gate(layer: int, name: str) -> str:
    return f"decoder.layers.{layer}.mlp.gate.{name}"

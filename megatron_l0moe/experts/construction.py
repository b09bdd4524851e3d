"""Experts without a training job: each method chooses the units of a layer from one calibration pass.

What the methods are, and what they are not: docs/experts.md.

F = FFN channels, E = units kept, H = hidden, K = experts.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_l0moe.checkpoints.safetensors_files import refuse_non_finite
from megatron_l0moe.checkpoints.torch_dist import CheckpointReader
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.experts.expert_file import cut_units, fingerprint, write_expert
from megatron_l0moe.experts.unit_choice import (
    Calibration,
    Pairs,
    cluster_of,
    keep_by_obs,
    keep_by_svd,
    refit,
    relative_error,
)
from megatron_l0moe.modules.hard_concrete import top_k
from megatron_l0moe.modules.tensor_parallel import keyed_generator

PAIRS: dict[str, Pairs] = {
    "random": "none",
    "magnitude": "none",
    "obs": "activations",
    "svd": "activations",
    "coactivation": "patterns",
}
"""The methods, and which products of pairs of units each needs."""


@dataclass(frozen=True, kw_only=True)
class ConstructionSettings:
    """What a method depends on besides the model and the text."""

    method: str
    width: int
    """E."""
    expert: int
    """k."""
    num_experts: int
    """K."""
    top_k: int
    """Experts that serve one token."""
    damping: float
    """Added to the diagonal of sums of a a^T, as a fraction of its mean."""
    shared: float
    """Share of an expert's units that all experts have (coactivation)."""
    seed: int


@dataclass(frozen=True, kw_only=True)
class LayerExpert:
    """What a method made of one layer."""

    units: Tensor
    """int64 [E], ascending."""
    down: Tensor | None = None
    """[H, E] in place of the units' columns of fc2; None: those as they are."""
    input_mean: Tensor
    """fp32 [H], what the router's start is made from."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Numbers for the manifest."""


def construct_layer(
    settings: ConstructionSettings, layer: int, calibration: Calibration, fc2: Tensor
) -> LayerExpert:
    """Choose exactly E units of a layer.

    Args:
        layer: global index, for the random method's seed and for messages.
        fc2: [H, F] of the dense model.

    Raises:
        L0MoEError: the width is impossible, or what was chosen never adds anything to the layer's output.
    """
    channels = fc2.shape[1]
    if not 1 <= settings.width <= channels:
        raise L0MoEError(
            f"model.expert_ffn ({settings.width}) must be between 1 and the {channels} FFN channels of layer {layer}."
        )
    made = _construct(settings, layer, calibration, fc2)
    assert made.units.shape == (settings.width,)
    weights = fc2[:, made.units] if made.down is None else made.down
    reach = calibration.activation_squares[made.units] * weights.double().square().sum(0)
    if not bool(reach.isfinite().all()):
        raise L0MoEError(
            f"Method {settings.method} gave weights of layer {layer} that are not finite; raise "
            "expert_training.calibration.damping."
        )
    if not bool((reach > 0).any()):
        raise L0MoEError(
            f"The {settings.width} units that method {settings.method} kept of layer {layer} are 0 on the whole "
            "calibration text, so the layer would be dead; raise model.expert_ffn, or take another method."
        )
    return made


def _construct(
    settings: ConstructionSettings, layer: int, calibration: Calibration, fc2: Tensor
) -> LayerExpert:
    mean = calibration.input_mean
    if settings.method == "random":
        units = random_units(settings.seed, settings.expert, layer, fc2.shape[1], settings.width)
        return LayerExpert(units=units, input_mean=mean)
    if settings.method == "magnitude":
        scores = magnitude_scores(calibration.activation_squares, fc2)
        return LayerExpert(units=top_k(scores, settings.width), input_mean=mean)
    if settings.method in ("obs", "svd"):
        return _repaired(settings, calibration, fc2)
    if settings.method == "coactivation":
        return _cluster(settings, calibration, fc2)
    raise L0MoEError(f"There is no method {settings.method!r} without training; use {', '.join(PAIRS)}.")


def _repaired(settings: ConstructionSettings, calibration: Calibration, fc2: Tensor) -> LayerExpert:
    """Choose by OBS or SVD, then fit the kept columns of fc2 to the dense layer's output."""
    assert calibration.pairs is not None
    weights, gram = fc2.double(), calibration.pairs.double()
    if settings.method == "obs":
        units = keep_by_obs(weights, gram, settings.width, settings.damping)
    else:
        units = keep_by_svd(weights, gram, settings.width)
    fitted = refit(weights, gram, units, settings.damping)
    return LayerExpert(
        units=units,
        down=fitted.down,
        input_mean=calibration.input_mean,
        numbers={
            "relative_error": relative_error(weights, gram, units, fitted.down),
            "relative_error_without_repair": relative_error(weights, gram, units, weights[:, units]),
            "damping": fitted.damping,
            # fewer tokens than units: the sums are singular, and the damping alone makes them solvable
            "singular": float(calibration.tokens < fc2.shape[1]),
        },
    )


def _cluster(settings: ConstructionSettings, calibration: Calibration, fc2: Tensor) -> LayerExpert:
    found = cluster_of(
        calibration,
        expert=settings.expert,
        experts=settings.num_experts,
        width=settings.width,
        share=settings.shared,
    )
    units, order = torch.cat([found.shared, found.own]).sort()
    factor = torch.ones(settings.width, dtype=torch.float64, device=fc2.device)
    factor[order >= found.shared.numel()] = settings.top_k
    return LayerExpert(
        units=units,
        down=fc2[:, units].double() * factor,
        input_mean=found.centre,
        numbers={"shared_units": float(found.shared.numel())},
    )


def random_units(seed: int, expert: int, layer: int, channels: int, width: int) -> Tensor:
    """Return E of the F units, all choices equally likely, keyed by seed, expert and layer; int64 [E], ascending."""
    return torch.randperm(channels, generator=keyed_generator(seed, expert, layer))[:width].sort().values


def magnitude_scores(activation_squares: Tensor, fc2: Tensor) -> Tensor:
    """Return how much each unit adds to the layer's output: Wanda's score of fc2, L2 over the outputs; fp64 [F].

    s_j = sqrt(sum_i (|W_ij| * ||a_j||_2)^2) = ||W_:j||_2 * ||a_j||_2, with ||a_j||_2 over the tokens. The rows of gate
    and up are in it through the activation a_j, which is all that they do.
    """
    return fc2.double().square().sum(0).sqrt() * activation_squares.sqrt()


def write_constructed(
    file: Path, layers: dict[int, LayerExpert], dense: CheckpointReader, *, method: str
) -> dict[str, object]:
    """Write units and router inputs and, where the method changed weights, all weights, in the dense model's dtype.

    Args:
        file: replaced when it exists.
        layers: the MoE layers; all have weights of their own or none.
        dense: the checkpoint that the units are those of.
        method: for the numbers.

    Returns:
        Numbers for the manifest.
    """
    width = next(iter(layers.values())).units.numel()
    tensors: dict[str, torch.Tensor] = {}
    fingerprints: dict[int, str] = {}
    parameters = 0
    for layer, made in sorted(layers.items()):
        prefix = f"decoder.layers.{layer}.mlp.linear_"
        fc1, fc2 = dense.read(f"{prefix}fc1.weight"), dense.read(f"{prefix}fc2.weight")  # [2F, H], [H, F]
        weights = cut_units(fc1, fc2, made.units)
        parts = {"units": made.units.int(), "input_mean": made.input_mean.float()}
        if made.down is None:
            fingerprints[layer] = fingerprint(fc1, fc2)
        else:
            weights["down"] = made.down.to(fc2.dtype)
            parts |= weights
        for part, tensor in weights.items():
            refuse_non_finite(f"{part} of layer {layer}", tensor)
        parameters += sum(tensor.numel() for tensor in weights.values())
        tensors |= {f"layers.{layer}.{part}": tensor for part, tensor in parts.items()}
    assert len(fingerprints) in (0, len(layers)), "a method gives weights for all layers or for none"
    write_expert(file, tensors, width=width, layers=sorted(layers), fingerprints=fingerprints or None)
    return {
        "method": method,
        "expert_ffn": width,
        "moe_layers": sorted(layers),
        "weights": not fingerprints,
        "bytes": file.stat().st_size,
        "parameters": parameters,
        "layers": {str(layer): made.numbers for layer, made in sorted(layers.items())},
    }

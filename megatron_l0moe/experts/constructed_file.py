"""Write the expert file of an expert that was constructed without training.

E = units kept, H = hidden.
"""

from pathlib import Path

import torch

from megatron_l0moe.checkpoints.safetensors_files import refuse_non_finite
from megatron_l0moe.checkpoints.torch_dist import CheckpointReader
from megatron_l0moe.experts.construction import LayerExpert
from megatron_l0moe.experts.cutting import cut_units, fingerprint
from megatron_l0moe.experts.expert_file import write_expert


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

    Raises:
        L0MoEError: weights are NaN or infinite.
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

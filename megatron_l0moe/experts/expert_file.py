"""The file of one expert: which E units it keeps in every MoE layer, their weights, and what the router needs.

`layers.{i}.units` int32 [E], ascending, and `layers.{i}.input_mean` fp32 [H] for every MoE layer i;
`layers.{i}.gate` [E, H], `layers.{i}.up` [E, H] and `layers.{i}.down` [H, E] unless the run trained masks only. An
expert is then a list of units of the dense model, whose MLPs the metadata name by a fingerprint for each layer.

The metadata say format, version, expert_ffn, moe_layers and hidden_size; with weights dtype, else fingerprints.
Version 1, which always holds weights, is still read.

F = FFN channels of the dense MLP, E = units kept, H = hidden.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_l0moe.checkpoints.safetensors_files import SafetensorsFile
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs.stage_folder import whole

FINGERPRINT_DIGITS = 16


def cut_units(
    fc1: torch.Tensor, fc2: torch.Tensor, units: torch.Tensor, z: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Return `gate` [E, H], `up` [E, H] and `down` [H, E] of the chosen units.

    A unit's gate z scales its activation silu(gate x) * (up x), so it can be multiplied into the unit's row of `up`.

    Args:
        fc1: [2F, H], gate then up.
        fc2: [H, F].
        units: int [E].
        z: fp32 [E]; None for 1, which copies the weights as they are.
    """
    gate, up = (part[units] for part in fc1.chunk(2))
    if z is not None:
        up = (up.float() * z[:, None]).to(up.dtype)  # in fp32 and rounded once; exact where z is 1
    return {"gate": gate, "up": up, "down": fc2[:, units]}


def fingerprint(fc1: torch.Tensor, fc2: torch.Tensor) -> str:
    """Return a digest of an MLP's weights, the same in float32 and bfloat16.

    They are rounded to bfloat16 first, as Megatron rounds the dense model when an expert run trains in bfloat16.
    """
    digest = hashlib.sha256()
    for tensor in (fc1, fc2):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().data)
    return digest.hexdigest()[:FINGERPRINT_DIGITS]


FORMAT = "l0moe-expert"
VERSION = "2"
READABLE = ("1", VERSION)
UNITS = ("units", "input_mean")
WEIGHTS = ("gate", "up", "down")


def write_expert(
    file: Path,
    tensors: dict[str, torch.Tensor],
    *,
    width: int,
    layers: list[int],
    fingerprints: dict[int, str] | None = None,
) -> None:
    """Write an expert file atomically.

    Args:
        tensors: `layers.{i}.{part}` for every layer.
        width: E.
        layers: the MoE layers, ascending.
        fingerprints: of the dense MLP of each layer, when the tensors hold no weights.
    """
    first = f"layers.{layers[0]}."
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "expert_ffn": str(width),
        "moe_layers": ",".join(map(str, layers)),
        "hidden_size": str(tensors[f"{first}input_mean"].numel()),
    }
    if fingerprints is None:
        metadata["dtype"] = str(tensors[f"{first}gate"].dtype).removeprefix("torch.")
    else:
        metadata["fingerprints"] = json.dumps(fingerprints)
    with whole(file) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)


class ExpertFile:
    """An expert file, read layer by layer.

    Raises:
        L0MoEError: the file is missing, truncated, of another kind, or does not hold what its metadata say.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        if not file.is_file():
            raise L0MoEError(f"Expert file {file} does not exist; run the stage `experts` first.")
        try:
            self._tensors = SafetensorsFile(file)
        except L0MoEError as error:
            raise L0MoEError(
                f"{file} is truncated or not a safetensors file; extract the expert again."
            ) from error
        metadata = self._tensors.metadata
        if metadata.get("format") != FORMAT or metadata.get("version") not in READABLE:
            raise L0MoEError(
                f"{file} is not an expert file of version {' or '.join(READABLE)}; extract the expert again."
            )
        self.fingerprints: dict[int, str] | None = None
        """Digest of the dense MLP of each layer, for an expert without weights of its own; else None."""
        try:
            self.width = int(metadata["expert_ffn"])
            self.layers = [int(layer) for layer in metadata["moe_layers"].split(",")]
            if "fingerprints" in metadata:
                self.fingerprints = {int(i): text for i, text in json.loads(metadata["fingerprints"]).items()}
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise L0MoEError(
                f"{file} does not say its width and layers ({error!r}); it is damaged, so extract the expert again."
            ) from error
        self._check()
        self.hidden = int(self._shape(self.layers[0], "input_mean")[0])

    @property
    def has_weights(self) -> bool:
        """Whether the file holds weights; else its units are those of a dense model."""
        return self.fingerprints is None

    def read(self, layer: int, part: str) -> torch.Tensor:
        """Read one part of a layer, of `UNITS` or, if the file has them, `WEIGHTS`; units are int64."""
        tensor = self._tensors.read(self._name(layer, part))
        return tensor.long() if part == "units" else tensor

    def _check(self) -> None:
        """Refuse a file that lacks a tensor, holds one too many, or holds units of another number."""
        parts = UNITS + (WEIGHTS if self.has_weights else ())
        expected = {self._name(layer, part) for layer in self.layers for part in parts}
        found = self._tensors.names
        if wrong := sorted(expected ^ found):
            how = "lacks" if wrong[0] in expected else "should not hold"
            raise L0MoEError(
                f"{self.file} {how} the tensor {wrong[0]}; it is damaged, so extract the expert again."
            )
        for layer in self.layers:
            shape = self._shape(layer, "units")
            if shape != [self.width] or (self.fingerprints is not None and layer not in self.fingerprints):
                raise L0MoEError(
                    f"{self.file} does not describe {self.width} units of layer {layer} (their shape is {shape}); "
                    "it is damaged, so extract the expert again."
                )

    def _shape(self, layer: int, part: str) -> list[int]:
        return list(self._tensors.shape(self._name(layer, part)))

    @staticmethod
    def _name(layer: int, part: str) -> str:
        assert part in UNITS + WEIGHTS, part
        return f"layers.{layer}.{part}"

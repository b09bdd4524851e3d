"""The file of one expert: in every MoE layer the E kept units of gate, up and down, and what the router needs.

`layers.{i}.gate` [E, H], `layers.{i}.up` [E, H], `layers.{i}.down` [H, E], `layers.{i}.units` int64 [E],
`layers.{i}.input_mean` fp32 [H]; the metadata say format, version, expert_ffn, moe_layers and dtype.
"""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_l0moe.errors import L0MoEError

FORMAT = "l0moe-expert"
VERSION = "1"
PARTS = ("gate", "up", "down", "units", "input_mean")


def write_expert(file: Path, tensors: dict[str, torch.Tensor], *, width: int, layers: list[int]) -> None:
    """Write an expert file atomically."""
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "expert_ffn": str(width),
        "moe_layers": ",".join(map(str, layers)),
        "dtype": str(tensors[f"layers.{layers[0]}.gate"].dtype).removeprefix("torch."),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


class ExpertFile:
    """An expert file, read layer by layer.

    Raises:
        L0MoEError: the file is missing, truncated or of another kind.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        if not file.is_file():
            raise L0MoEError(f"Expert file {file} does not exist; run the stage `experts` first.")
        try:
            self._handle: Any = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise L0MoEError(
                f"{file} is truncated or not a safetensors file ({error}); extract the expert again."
            ) from error
        metadata = self._handle.metadata() or {}
        if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
            raise L0MoEError(f"{file} is not an expert file of version {VERSION}; extract the expert again.")
        self.width = int(metadata["expert_ffn"])
        self.layers = [int(layer) for layer in metadata["moe_layers"].split(",")]
        self.hidden = int(self._handle.get_slice(self._name(self.layers[0], "gate")).get_shape()[1])

    def read(self, layer: int, part: str) -> torch.Tensor:
        """Read one of `PARTS` of a layer."""
        tensor: torch.Tensor = self._handle.get_tensor(self._name(layer, part))
        return tensor

    @staticmethod
    def _name(layer: int, part: str) -> str:
        assert part in PARTS, part
        return f"layers.{layer}.{part}"

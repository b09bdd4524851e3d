"""The stage `convert`: a dense Hugging Face checkpoint becomes a Megatron checkpoint, a block of rows at a time.

Also the way back for an L0-MoE that `export` wrote: a Megatron checkpoint like that of `assemble`, to train on.
"""

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_l0moe.checkpoints.families import (
    MoEShape,
    dense_rules,
    empty_hf_names,
    extra_states,
    ignored_hf_names,
    moe_arguments,
)
from megatron_l0moe.checkpoints.rules import ReadRows, Rule, blocks, check_names, check_shape, hf_shapes
from megatron_l0moe.checkpoints.safetensors_files import SafetensorsFolder, refuse_non_finite
from megatron_l0moe.checkpoints.torch_dist import MEGATRON_FOLDER, CheckpointWriter, common_state
from megatron_l0moe.conversion.moe_layouts import LAYOUTS, layout_of
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runtime.platform import keep_freed_memory
from megatron_l0moe.sizes.architecture import Architecture, first_architecture, read_config

logger = logging.getLogger(__name__)

_HEAD = "lm_head.weight"
LOG_SECONDS = 5.0
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def convert_dense(hf: Path, out: Path) -> dict[str, object]:
    """Write `out/megatron`, a Megatron torch_dist checkpoint (`release`) of a dense Hugging Face model.

    Tensors keep their dtype. It can be loaded at any TP/PP size.

    Returns:
        Numbers for the manifest: parameters, tensors, bytes, seconds, the architecture.

    Raises:
        L0MoEError: a checkpoint that is missing, damaged, not supported, or not what its config says.
    """
    architecture = Architecture.from_hf(hf)
    common = common_state(
        architecture.megatron_arguments(),
        {"stage": "dense", "architecture": asdict(architecture)},
        architecture.vocab_size,
    )
    return _convert(hf, out, architecture, None, dense_rules(architecture), common)


def weight_files(hf: Path) -> list[Path]:
    """Return the files that the weights of a checkpoint are read from."""
    read_config(hf)
    return SafetensorsFolder(hf).paths


def convert_moe(hf: Path, out: Path) -> dict[str, object]:
    """Write `out/megatron` out of an L0-MoE that `export` wrote, in whichever layout, for continued MoE training.

    Tensors and settings are those of the checkpoint that was exported, bit by bit.

    Returns:
        As `convert_dense`, and the numbers of the experts.

    Raises:
        L0MoEError: as `convert_dense`, or a config.json that describes more than an L0-MoE has.
    """
    config = read_config(hf)
    layout = layout_of(config, hf / "config.json")
    architecture, moe = layout.read(config, hf / "config.json")
    common = common_state(
        {**architecture.megatron_arguments(), **moe_arguments(architecture, moe)},
        {"stage": "moe", "architecture": asdict(architecture), **asdict(moe)},
        architecture.vocab_size,
    )
    numbers = _convert(hf, out, architecture, moe, layout.rules(architecture, moe), common)
    return {**numbers, **asdict(moe)}


def convert_any(hf: Path, out: Path) -> dict[str, object]:
    """Convert a dense checkpoint or an exported L0-MoE, as its config.json says."""
    is_moe = first_architecture(read_config(hf)) in {layout.hf_architecture for layout in LAYOUTS.values()}
    return convert_moe(hf, out) if is_moe else convert_dense(hf, out)


def _convert(
    hf: Path,
    out: Path,
    architecture: Architecture,
    moe: MoEShape | None,
    rules: list[Rule],
    common: dict[str, Any],
) -> dict[str, object]:
    start = time.monotonic()
    keep_freed_memory()
    source = SafetensorsFolder(hf)
    expected = hf_shapes(rules)
    check_names(source.names - _redundant(architecture, moe, source), set(expected), str(hf))
    for name, shape in expected.items():
        check_shape(name, source.shape(name), {name: shape}, str(hf))
    _check_tied(architecture, source)

    def read(name: str, begin: int = 0, end: int | None = None) -> torch.Tensor:
        tensor = source.read(name, begin, end)
        if tensor.dtype not in _FLOATS:
            raise L0MoEError(
                f"{hf}: the tensor {name} is {tensor.dtype}, but weights must be bfloat16, float16 or float32, not "
                "quantised or integer; convert the model first."
            )
        rows = expected[name][0]
        refuse_non_finite(name if len(tensor) == rows else f"{name}, rows {begin} to {end},", tensor)
        return tensor

    with CheckpointWriter(out / MEGATRON_FOLDER, common) as writer:
        parameters, size = write_pieces(writer, rules, read)
        for name, shards in extra_states(architecture, moe).items():
            writer.write_empty_state(name, shards)
    seconds = time.monotonic() - start
    logger.info("converted %s: %d parameters in %.1f s", hf, parameters, seconds)
    return {
        "architecture": asdict(architecture),
        "parameters": parameters,
        "tensors": len(expected),
        "bytes": size,
        "seconds": seconds,
    }


def write_pieces(writer: CheckpointWriter, rules: list[Rule], read: ReadRows) -> tuple[int, int]:
    """Run rules towards Megatron; return the numbers of values and of bytes written."""
    values = size = 0
    logged = time.monotonic()
    for done, rule in enumerate(rules):
        for piece in rule.to_megatron(_one_dtype(read)):
            writer.write_piece(piece)
            values += piece.tensor.numel()
            size += piece.tensor.numel() * piece.tensor.element_size()
        if time.monotonic() - logged > LOG_SECONDS:
            logged = time.monotonic()
            logger.info("%d of %d rules, %.2f GB", done + 1, len(rules), size / 1e9)
    return values, size


def _one_dtype(read: ReadRows) -> ReadRows:
    """Return a reader for one rule, whose tensors become one of Megatron's: torch would mix their dtypes silently."""
    first: tuple[str, torch.dtype] | None = None

    def checked(name: str, begin: int = 0, end: int | None = None) -> torch.Tensor:
        nonlocal first
        tensor = read(name, begin, end)
        first = first or (name, tensor.dtype)
        if tensor.dtype is not first[1]:
            raise L0MoEError(
                f"The tensor {name} is {tensor.dtype}, but {first[0]}, with which it becomes one tensor of Megatron, "
                f"is {first[1]}; convert the model to one dtype first."
            )
        return tensor

    return checked


def _redundant(architecture: Architecture, moe: MoEShape | None, source: SafetensorsFolder) -> set[str]:
    """Names of tensors that carry nothing: computed or empty ones, and a tied output layer stored a second time."""
    names = source.names & ignored_hf_names(architecture)
    names |= {name for name in source.names & empty_hf_names(architecture, moe) if 0 in source.shape(name)}
    if architecture.tied_embeddings:
        names |= source.names & {_HEAD}
    return names


def _check_tied(architecture: Architecture, source: SafetensorsFolder) -> None:
    tied = architecture.tied_embeddings and _HEAD in source.names
    if tied and not _equal(source, _HEAD, "model.embed_tokens.weight"):
        raise L0MoEError(
            f"{source.folder}: config.json says tie_word_embeddings = true, but lm_head.weight differs from "
            "model.embed_tokens.weight; set it to false in a copy of the checkpoint."
        )


def _equal(source: SafetensorsFolder, one: str, other: str) -> bool:
    shape = source.shape(one)
    return shape == source.shape(other) and all(
        torch.equal(source.read(one, begin, end), source.read(other, begin, end))
        for begin, end in blocks(shape)
    )

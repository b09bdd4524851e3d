"""Read a GGUF file, or all parts of a split one: the header's keys, and tensors by rows as float32.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the `gguf` package reads and dequantises it.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants

from megatron_l0moe.checkpoints.safetensors_files import first_overlap
from megatron_l0moe.errors import L0MoEError

_PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
_MAX_PARTS = 10000
_PLAIN = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
# What the package's reader raises for bytes that are no GGUF.
_DAMAGED = (ValueError, IndexError, KeyError, OverflowError, TypeError, MemoryError)


@dataclass(frozen=True)
class _Part:
    path: Path
    fields: dict[str, Any]
    tensors: dict[str, Any]
    """`gguf.ReaderTensor` by name; its data are mapped, not read."""


class GGUFFile:
    """The header and the tensors of one model.

    Args:
        path: the file, or any part of a split one (`NAME-00001-of-00003.gguf`); the others lie beside it.

    Raises:
        L0MoEError: a file or part that is missing, truncated or damaged, parts that do not belong together, a kind of
            quantisation that is not known.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        parts = _parts(path)
        self.fields: dict[str, Any] = parts[0].fields
        """Of the first part: numbers, texts, booleans and lists of them."""
        self._tensors: dict[str, tuple[Path, Any]] = {}
        for part in parts:
            for name, tensor in part.tensors.items():
                if name in self._tensors:
                    raise L0MoEError(
                        f"{part.path} holds the tensor {name}, which {self._tensors[name][0].name} holds too; "
                        "download the files again."
                    )
                self._tensors[name] = (part.path, tensor)

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape in torch's order, rows first."""
        return tuple(int(size) for size in reversed(self._tensors[name][1].shape))

    def read(self, name: str, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Read rows `begin` up to and without `end`, by default all, expanded to float32."""
        tensor = self._tensors[name][1]
        values = quants.dequantize(tensor.data[begin:end], tensor.tensor_type)
        return torch.from_numpy(
            numpy.array(values, dtype=numpy.float32)
        )  # a copy: the file is mapped read-only


def _parts(path: Path) -> list[_Part]:
    """Open the file, and the other parts if it is one of several."""
    given = _open(path)
    count = given.fields.get("split.count", 1)
    if not isinstance(count, int) or not 0 <= count <= _MAX_PARTS:
        raise L0MoEError(f"{path}: split.count must be at most {_MAX_PARTS}, got {count!r}.")
    if count <= 1:
        return [given]
    match = _PART_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise L0MoEError(
            f"{path} is one of {count} parts of a model but is not named so, and the others cannot be found; "
            f"name all as NAME-00001-of-{count:05d}.gguf."
        )
    parts = []
    for number in range(count):
        file = path.with_name(f"{match[1]}-{number + 1:05d}-of-{count:05d}.gguf")
        if not file.is_file():
            raise L0MoEError(f"{file} is missing, one of the {count} parts of {path.name}; download it too.")
        part = given if file == path else _open(file)
        found = (part.fields.get("split.no"), part.fields.get("split.count"))
        if found != (number, count):
            raise L0MoEError(
                f"{file} says that it is part {found[0]} (counted from 0) of {found[1]}; give each part its own name."
            )
        parts.append(part)
    _check_parts(parts)
    return parts


def _check_parts(parts: list[_Part]) -> None:
    """Refuse parts of different models: only the first one's header is used."""
    first, total = parts[0], sum(len(part.tensors) for part in parts)
    for part in parts[1:]:
        for key, value in part.fields.items():
            if not key.startswith("GGUF.") and key not in _SPLIT_KEYS and first.fields.get(key) != value:
                raise L0MoEError(
                    f"{part.path} has another {key} than {first.path.name}; download the files again."
                )
    for part in parts:
        expected = part.fields.get("split.tensors.count", total)
        if expected != total:
            raise L0MoEError(
                f"{part.path} says that all parts hold {expected} tensors, but they hold {total}; download them again."
            )


def _open(path: Path) -> _Part:
    if not path.is_file():
        raise L0MoEError(f"GGUF file {path} does not exist.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise L0MoEError(f"{path} is not a GGUF file (its first four bytes are not 'GGUF').")
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except _DAMAGED as error:
        reason = " ".join(str(error).split())[:200]
        raise L0MoEError(f"{path} is truncated or damaged ({reason}); download it again.") from error
    if reader.byte_order != "I":
        raise L0MoEError(
            f"{path} has the other byte order than this machine; convert it from its source again."
        )
    spans = {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type
        if kind not in _PLAIN and kind not in quants._type_traits:
            raise L0MoEError(
                f"{path}: the tensor {tensor.name} is of type {kind.name}, which is not supported; take a file with "
                "another quantisation, or the model's Hugging Face checkpoint."
            )
        if tensor.n_elements and not tensor.n_bytes:
            raise L0MoEError(f"{path} is damaged at the tensor {tensor.name}; download it again.")
        spans[tensor.name] = (int(tensor.data_offset), int(tensor.data_offset) + int(tensor.n_bytes))
    if both := first_overlap(spans):
        raise L0MoEError(
            f"{path} says that {both[0]} and {both[1]} lie in the same bytes; download it again."
        )
    end = max((last for _, last in spans.values()), default=0)
    if path.stat().st_size < end:
        raise L0MoEError(
            f"{path} is truncated ({path.stat().st_size} bytes, its tensors need {end}); download it again."
        )
    return _Part(path, fields, {tensor.name: tensor for tensor in reader.tensors})

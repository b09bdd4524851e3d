"""Turn a GGUF file, or all parts of a split one, into an ordinary Hugging Face checkpoint; what is not used is refused.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the `gguf` package reads and dequantises it, and
tensors are read by rows as float32. Header keys are those of llama.cpp (https://github.com/ggml-org/llama.cpp,
gguf-py/gguf/constants.py); a key of the model's architecture that is not listed here may change what the model
computes, and is refused.
"""

import json
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants

from megatron_l0moe.checkpoints.families import dense_rules
from megatron_l0moe.checkpoints.rules import (
    Shape,
    blocks,
    check_names,
    check_shape,
    half_split_rows,
    hf_shapes,
)
from megatron_l0moe.checkpoints.safetensors_files import (
    SafetensorsWriter,
    first_overlap,
    refuse_existing_checkpoint,
)
from megatron_l0moe.conversion.gguf_tokenizer import tokenizer_of
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs.stage_folder import write_text
from megatron_l0moe.sizes.architecture import MEGATRON_LLAMA3_SCALING, Architecture, integer

logger = logging.getLogger(__name__)

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
        """The header's fields of the first part: numbers, texts, booleans and lists of them."""
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


# general.architecture of the file -> transformers' architecture. GGUF files of Mistral models say 'llama' too.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROPE_FACTORS = "rope_freqs.weight"
"""[D / 2]: what the frequencies of Llama-3.1's RoPE are divided by."""
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Keys after the architecture's name -> key of config.json.
_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
# Keys that change nothing when they hold one of these values, and are refused otherwise.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("expert_count", "expert_used_count", "expert_shared_count"), (0,)),
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "rope.scale_linear": (1.0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.finetuned": (True, False),
    "tensor_data_layout": (
        "Meta AI original pth",
    ),  # rows of q and k in neighbour pairs, as in every llama file
}
# Read in a place of their own.
_READ = (
    *("attention.value_length", "vocab_size", "rope.dimension_count"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
)


def gguf_to_hf(
    gguf: Path, out: Path, *, dtype: Literal["float32", "bfloat16"] = "float32"
) -> dict[str, object]:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face checkpoint.

    Quantised weights are expanded, a block of rows at a time; the quantisation error stays.

    Args:
        gguf: file of a Llama-like or Qwen2 model, or any part of a split one, beside the other parts.
        out: folder that holds no checkpoint yet.
        dtype: of the written weights.

    Returns:
        Facts for a manifest: name, licence, parameters.

    Raises:
        L0MoEError: the file is missing, truncated or damaged, lacks a tensor, or holds a tensor, a setting or a
            tokenizer that is not supported.
    """
    file = GGUFFile(gguf)
    fields = file.fields
    architecture = _architecture(file)
    tensors = _table(file, architecture)
    tokenizer = tokenizer_of(fields, gguf, architecture.vocab_size)
    refuse_existing_checkpoint(out)
    logger.info("reading %s", gguf)
    out.mkdir(parents=True, exist_ok=True)
    parameters = 0
    with SafetensorsWriter(out, tensors) as writer:
        for name in sorted(tensors):
            for begin, rows in _rows(file, architecture, tensors[name]):
                writer.write(name, rows.to(DTYPES[dtype]), begin=begin, rows=file.shape(tensors[name])[0])
                parameters += rows.numel()
    tokenizer.save(out)
    if licence := fields.get("general.license"):
        write_text(out / "README.md", f"---\nlicense: {licence}\n---\n")  # where model cards look for it
    write_text(out / "generation_config.json", json.dumps(tokenizer.ids, indent=2) + "\n")
    written = {**architecture.hf_config(dtype), **tokenizer.ids}
    write_text(out / "config.json", json.dumps(written, indent=2) + "\n")
    logger.info("wrote %s", out)
    return {
        "name": fields.get("general.name"),
        "license": fields.get("general.license"),
        "parameters": parameters,
    }


def _architecture(file: GGUFFile) -> Architecture:
    """Return the model that the header describes, after every key of it was understood."""
    fields, path = file.fields, file.path
    kind = fields.get("general.type", "model")
    name = fields.get("general.architecture")
    if kind != "model" or name not in ARCHITECTURES:
        what = f"a model of architecture {name!r}" if kind == "model" else f"no model but of type {kind!r}"
        raise L0MoEError(
            f"{path} holds {what}, which is not supported; supported are {', '.join(sorted(ARCHITECTURES))}."
        )
    own = {key.removeprefix(f"{name}."): value for key, value in fields.items() if key.startswith(f"{name}.")}
    for key, value in own.items():
        known = key in _SIZES or key in _READ or (key in _HARMLESS and value in _HARMLESS[key])
        if not known:
            raise L0MoEError(
                f"{path} sets {name}.{key} = {str(value)[:80]}, which changes what the model computes and is not "
                "supported."
            )
    for prefix in ("adapter.", "clip."):
        if found := sorted(key for key in fields if key.startswith(prefix)):
            raise L0MoEError(f"{path} sets {found[0]}, so it is no language model by itself.")
    return Architecture.from_config(_config(file, str(name), own), path)


def _config(file: GGUFFile, name: str, own: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of the header's own keys."""
    config = {hf: _one(own[key]) for key, hf in _SIZES.items() if key in own}
    for key in ("rms_norm_eps", "max_position_embeddings"):
        if key not in config:  # transformers' defaults are those of other models
            raise L0MoEError(f"{file.path} does not give {key}; download it again.")
    for key in ("rms_norm_eps", "rope_theta"):
        if isinstance(config.get(key), float):
            # The file holds float32: 9.999999747378752e-06 was 1e-05.
            config[key] = float(str(numpy.float32(config[key])))
    heads, hidden = (integer(config, key, file.path) for key in ("num_attention_heads", "hidden_size"))
    head_dim = config.get("head_dim") or hidden // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, head_dim) != head_dim:
            raise L0MoEError(
                f"{file.path} sets {name}.{key} = {own[key]}, but only the size of a head, {head_dim}, is supported."
            )
    embedding = "token_embd.weight"
    if embedding not in file.names or len(file.shape(embedding)) != 2:
        raise L0MoEError(f"{file.path} lacks the matrix {embedding}; download it again.")
    vocab = file.shape(embedding)[0]
    if own.get("vocab_size", vocab) != vocab:
        raise L0MoEError(
            f"{file.path} sets {name}.vocab_size = {own['vocab_size']}, but {embedding} has {vocab} rows."
        )
    return {
        **config,
        "architectures": [ARCHITECTURES[name]],
        "vocab_size": vocab,
        "tie_word_embeddings": "output.weight" not in file.names,
        "rope_scaling": _scaling(own) or _llama3_scaling(file, head_dim, config.get("rope_theta", 10000.0)),
    }


def _one(value: Any) -> Any:
    """Return a number that the header may also give for each layer."""
    return value[0] if isinstance(value, list) and len(set(value)) == 1 else value


def _scaling(own: dict[str, Any]) -> dict[str, Any] | None:
    """Return the scaling in the header in the form of config.json, which says whether it is supported."""
    kind, factor = own.get("rope.scaling.type", "none"), own.get("rope.scaling.factor", 1.0)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    return {"rope_type": kind, "factor": factor}


def _llama3_scaling(file: GGUFFile, head_dim: Any, base: Any) -> dict[str, Any] | None:
    """Return the scaling whose factors of each frequency the file holds as a tensor.

    Raises:
        L0MoEError: they are not Llama-3.1's with the constants that Megatron computes with.
    """
    if ROPE_FACTORS not in file.names:
        return None
    found = file.read(ROPE_FACTORS).double().flatten()
    factor = round(float(found.max()), 4) if found.numel() else 0.0
    scaling = {"rope_type": "llama3", "factor": factor, **MEGATRON_LLAMA3_SCALING}
    usable = (
        type(head_dim) is int
        and isinstance(base, float)
        and base > 1
        and math.isfinite(factor)
        and factor > 0
    )
    expected = _llama3_factors(head_dim, base, scaling) if usable else torch.empty(0)
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-4):
        raise L0MoEError(
            f"{file.path}: the factors of the frequencies in {ROPE_FACTORS} are not those of Llama-3.1's RoPE "
            "scaling; others are not supported."
        )
    return None if factor == 1 else scaling


def _llama3_factors(head_dim: int, base: float, scaling: dict[str, Any]) -> torch.Tensor:
    """Return what each of the D / 2 frequencies is divided by (transformers, modeling_rope_utils.py)."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    frequencies = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors: torch.Tensor = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return factors


def _table(file: GGUFFile, architecture: Architecture) -> dict[str, str]:
    """Return the GGUF name of every Hugging Face tensor; raise where the file holds others, or other shapes."""
    shapes = hf_shapes(dense_rules(architecture))
    table = {hf: _gguf_name(hf) for hf in shapes}
    expected: dict[str, Shape] = {table[hf]: shape for hf, shape in shapes.items()}
    check_names(file.names - {ROPE_FACTORS}, set(expected), str(file.path))
    for name in expected:
        check_shape(name, file.shape(name), expected, str(file.path))
    return table


def _gguf_name(hf: str) -> str:
    name, suffix = hf.rsplit(".", 1)
    if not name.startswith("model.layers."):
        return f"{_NAMES[name]}.{suffix}"
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{_NAMES[part]}.{suffix}"


def _rows(file: GGUFFile, architecture: Architecture, name: str) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield blocks of a tensor's rows and the index of their first, q and k of a llama file in halves again."""
    shape, dim = file.shape(name), 1
    turned = file.fields["general.architecture"] == "llama" and name.endswith(
        ("attn_q.weight", "attn_k.weight")
    )
    if turned:
        dim = architecture.head_dim
    for begin, end in blocks((shape[0] // dim, dim, *shape[1:])):
        rows = file.read(name, begin * dim, end * dim)
        yield begin * dim, half_split_rows(rows, dim) if turned else rows

"""Turn a GGUF file into an ordinary Hugging Face checkpoint, through transformers' own GGUF loading."""

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy
import torch

from megatron_l0moe.conversion.architecture import Architecture
from megatron_l0moe.conversion.safetensors_files import (
    SafetensorsWriter,
    refuse_existing_checkpoint,
)
from megatron_l0moe.data.manifest import write_text
from megatron_l0moe.errors import L0MoEError

logger = logging.getLogger(__name__)

# general.architecture of the file -> transformers' architecture. GGUF files of Mistral models say 'llama' too.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def gguf_to_hf(
    gguf: Path, out: Path, *, dtype: Literal["float32", "bfloat16"] = "float32"
) -> dict[str, object]:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face checkpoint.

    Quantised weights are expanded; the quantisation error stays. Peak memory: the expanded model, once.

    Args:
        gguf: file of a Llama-like or Qwen2 model.
        out: folder that holds no checkpoint yet.
        dtype: of the written weights.

    Returns:
        Facts for a manifest: name, licence, parameters.

    Raises:
        L0MoEError: the file is missing, truncated, not a GGUF, or of another architecture.
    """
    fields = _check(gguf)
    refuse_existing_checkpoint(out)
    from transformers import AutoModelForCausalLM

    logger.info("reading %s", gguf)
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=DTYPES[dtype])
    config = model.config.to_dict()
    config["architectures"] = [ARCHITECTURES[str(fields["general.architecture"])]]
    # The file holds float32: 9.999999747378752e-06 was 1e-05.
    config["rms_norm_eps"] = float(str(numpy.float32(config["rms_norm_eps"])))
    architecture = Architecture.from_config(config, gguf)
    state = model.state_dict()
    if architecture.tied_embeddings:
        state.pop("lm_head.weight", None)
    out.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(gguf, out, str(fields.get("tokenizer.ggml.pre", "")), fields)
    with SafetensorsWriter(out, state) as writer:
        for name in sorted(state):
            writer.write(name, state[name])
    if licence := fields.get("general.license"):
        write_text(out / "README.md", f"---\nlicense: {licence}\n---\n")  # where model cards look for it
    special = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_text(out / "generation_config.json", json.dumps(special, indent=2) + "\n")
    written = {**architecture.hf_config(dtype), **special}
    write_text(out / "config.json", json.dumps(written, indent=2) + "\n")
    logger.info("wrote %s", out)
    return {
        "name": fields.get("general.name"),
        "license": fields.get("general.license"),
        "parameters": sum(tensor.numel() for tensor in state.values()),
    }


def _check(path: Path) -> dict[str, Any]:
    """Return the header's fields of a complete GGUF file of a supported architecture."""
    if not path.is_file():
        raise L0MoEError(f"GGUF file {path} does not exist.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise L0MoEError(f"{path} is not a GGUF file (its first four bytes are not 'GGUF').")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        end = max(int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise L0MoEError(f"{path} is truncated or damaged ({error}); download it again.") from error
    if path.stat().st_size < end:
        raise L0MoEError(
            f"{path} is truncated ({path.stat().st_size} bytes, its tensors need {end}); download it again."
        )
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise L0MoEError(
            f"{path} holds a model of architecture {architecture!r}, which is not supported; supported are "
            f"{', '.join(sorted(ARCHITECTURES))}."
        )
    return fields


def _write_tokenizer(path: Path, out: Path, pre: str, fields: dict[str, Any]) -> None:
    """Write the tokenizer, with the word splitting that `tokenizer.ggml.pre` names.

    transformers takes GPT-2's splitting for every byte-level BPE, which encodes digits and runs of spaces in
    another way than the model was trained with (https://github.com/ggml-org/llama.cpp, llama-vocab.cpp).
    """
    from tokenizers import Regex, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    if fields.get("tokenizer.ggml.model") == "gpt2":
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        qwen2 = Regex(_LLAMA3_PATTERN.replace("{1,3}", ""))
        splitting = {
            "gpt-2": byte_level,
            "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
            "llama-bpe": pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex(_LLAMA3_PATTERN), "isolated"), bytes_only]
            ),
            "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(qwen2, "isolated"), bytes_only]),
        }
        if pre not in splitting:
            raise L0MoEError(
                f"{path}: the tokenizer's word splitting {pre!r} is not supported; supported are "
                f"{', '.join(sorted(splitting))}: use the model's Hugging Face checkpoint instead."
            )
        tokenizer.backend_tokenizer.pre_tokenizer = splitting[pre]
    with tempfile.TemporaryDirectory(dir=out) as folder:
        tokenizer.save_pretrained(folder)
        settings = Path(folder) / "tokenizer_config.json"
        values = json.loads(settings.read_text(encoding="utf-8"))
        for key in ("is_local", "local_files_only", "backend"):
            values.pop(key, None)
        # The name that transformers 4 and 5 both know for "as tokenizer.json says".
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_text(settings, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        for file in sorted(Path(folder).iterdir()):
            os.replace(file, out / file.name)

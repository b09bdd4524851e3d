"""Small random L0-MoEs, exported by the package's own code, and checkpoints with a fault on purpose.

A random model is written as a Hugging Face checkpoint, imported into Megatron's form and exported again, so that what
an engine gets is what `l0moe export` writes. The tokenizer knows single bytes.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_l0moe.checkpoints.safetensors_files import SafetensorsFolder, SafetensorsWriter
from megatron_l0moe.checkpoints.torch_dist import MEGATRON_FOLDER
from megatron_l0moe.conversion.convert import convert_moe
from megatron_l0moe.conversion.export import export_moe
from megatron_l0moe.conversion.targets import Target
from megatron_l0moe.evaluation.bench.shapes import SHAPES, Shape, write_pair

END = "<|end|>"
SPREAD = 4.0
"""Weights are this much larger than a fresh model's, so that logits differ clearly and a fault changes them."""

Change = Callable[[str, torch.Tensor], torch.Tensor | None]


def small_shape(name: str, *, renormalised: bool = True) -> Shape:
    """Return 4 layers of width 128 with 8 experts, of the family of a published shape."""
    published = SHAPES[name]
    sizes = {
        "hidden_size": 128,
        "ffn_hidden_size": 256,
        "num_layers": 4,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 32,
        "vocab_size": 320,
        "max_position_embeddings": 1024,
    }
    experts = {"dense_layers": 1, "num_experts": 8, "expert_ffn": 64, "renormalised": renormalised}
    return Shape(dense=replace(published.dense, **sizes), moe=replace(published.moe, **experts))


def random_export(shape: Shape, folder: Path, target: Target) -> Path:
    """Write a base model with a tokenizer, an L0-MoE in Megatron's form and its export; returns the export."""
    base, moe = write_pair(shape, folder / "random", dtype="float32")
    widened = rewrite(
        moe, folder / "widened", lambda name, tensor: tensor * (SPREAD if _is_projection(name) else 1)
    )
    _byte_tokenizer().save_pretrained(base)
    convert_moe(widened, folder / "imported")
    export_moe(
        folder / "imported" / MEGATRON_FOLDER,
        base,
        folder / "export",
        dense_layers=shape.moe.dense_layers,
        top_k=shape.moe.top_k,
        target=target,
    )
    return folder / "export"


def rewrite(source: Path, out: Path, change: Change) -> Path:
    """Copy a checkpoint with changed tensors; None leaves a tensor out."""
    tensors = SafetensorsFolder(source)
    changed = ((name, change(name, tensors.read(name))) for name in sorted(tensors.names))
    kept = {name: tensor for name, tensor in changed if tensor is not None}
    with SafetensorsWriter(out, kept) as writer:
        for name, tensor in kept.items():
            writer.write(name, tensor)
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith("model"):
            shutil.copyfile(file, out / file.name)
    return out


def first_moe_layer(folder: Path) -> int:
    """Return the number of an export's first layer with experts."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    start = config.get("moe_layer_start_index")
    return int(len(config["mlp_only_layers"]) if start is None else start)


def with_rolled_router(source: Path, out: Path) -> Path:
    """Give the first router's rows to the experts next to their own."""
    name_of_router = f"model.layers.{first_moe_layer(source)}.mlp.gate.weight"
    return rewrite(source, out, lambda name, tensor: tensor.roll(1, 0) if name == name_of_router else tensor)


def without_qkv_bias(source: Path, out: Path) -> Path:
    """Leave out the zero biases that vLLM's Qwen2-MoE asks for whatever config.json says."""
    return rewrite(source, out, lambda name, tensor: None if name.endswith("_proj.bias") else tensor)


def _is_projection(name: str) -> bool:
    return name.endswith("_proj.weight")


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END: 0, **{symbol: i + 1 for i, symbol in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)

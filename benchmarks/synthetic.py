"""Random checkpoints of any size, written block by block: a dense Hugging Face model, and expert files for it."""

import json
from pathlib import Path

import torch

from megatron_l0moe.checkpoints.families import dense_rules
from megatron_l0moe.checkpoints.rules import blocks, hf_shapes
from megatron_l0moe.checkpoints.safetensors_files import MAX_SHARD_BYTES, SafetensorsWriter
from megatron_l0moe.checkpoints.torch_dist import CheckpointReader
from megatron_l0moe.experts.expert_file import fingerprint, write_expert
from megatron_l0moe.sizes.architecture import Architecture

STD = 0.02
POOL_VALUES = 2**24  # random values that are repeated: to draw billions would take minutes


def llama_config(*, layers: int, hidden: int, ffn: int, vocab: int, head_dim: int = 128) -> dict[str, object]:
    """Return config.json of a Llama with four query heads for each key and value head, as Llama-3 has them."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // head_dim,
        "num_key_value_heads": max(1, hidden // head_dim // 4),
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }


def write_dense(
    folder: Path,
    config: dict[str, object],
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write a random dense model of any supported family; return its bytes."""
    shapes = hf_shapes(dense_rules(Architecture.from_config(config, folder)))
    pool = (torch.randn(POOL_VALUES, generator=torch.Generator().manual_seed(seed)) * STD).to(dtype)
    size = 0
    with SafetensorsWriter(folder, shapes, max_shard_bytes) as writer:
        for i, (name, shape) in enumerate(shapes.items()):
            for begin, end in blocks(shape):
                values = (end - begin) * (shape[1] if len(shape) > 1 else 1)
                start = (begin + i) * 977 % (POOL_VALUES - values)  # every block another part
                part = pool[start : start + values].view(end - begin, *shape[1:])
                writer.write(name, part, begin=begin, rows=shape[0])
                size += values * dtype.itemsize
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return size


def write_experts(folder: Path, dense: Path, *, count: int, width: int, weights: bool = True) -> None:
    """Write expert files 0.safetensors, ... for all layers of a dense Megatron checkpoint, with weights or as lists."""
    source = CheckpointReader(dense)
    config = source.settings["architecture"]
    hidden, ffn, layers = config["hidden_size"], config["ffn_hidden_size"], list(range(config["num_layers"]))
    generator = torch.Generator().manual_seed(1)
    pool = (torch.randn(POOL_VALUES, generator=generator) * STD).bfloat16()
    prefix = "decoder.layers.{}.mlp.linear_{}.weight"
    prints = {
        i: fingerprint(source.read(prefix.format(i, "fc1")), source.read(prefix.format(i, "fc2")))
        for i in ([] if weights else layers)
    }
    for k in range(count):
        tensors = {}
        for i in layers:
            units = torch.randperm(ffn, generator=generator)[:width].sort().values
            tensors[f"layers.{i}.units"] = units.int()
            tensors[f"layers.{i}.input_mean"] = torch.randn(hidden, generator=generator)
            for n, part in enumerate(("gate", "up", "down") if weights else ()):
                start = (k * 31 + i * 7 + n) * 977 % (POOL_VALUES - width * hidden)
                shape = (hidden, width) if part == "down" else (width, hidden)
                tensors[f"layers.{i}.{part}"] = pool[start : start + width * hidden].clone().view(shape)
        file = folder / f"{k:03d}.safetensors"
        write_expert(file, tensors, width=width, layers=layers, fingerprints=prints or None)

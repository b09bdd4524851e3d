"""Write Megatron checkpoints as Hugging Face checkpoints that need no custom code, one tensor at a time.

A dense model is written in its own family's layout; an L0-MoE as Ernie4.5-MoE: SwiGLU experts, softmax router whose
top-k weights are renormalised, dense layers first, no shared expert, no q/k norm. Ernie rotates q and k in neighbour
pairs, so their rows are reordered; the scores do not change.
"""

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from megatron_l0moe.conversion.architecture import Architecture, read_config
from megatron_l0moe.conversion.families import MoEShape, dense_rules, ernie_moe_rules, is_training_state
from megatron_l0moe.conversion.mapping import Rule, check_names, check_shape, hf_shapes, megatron_shapes
from megatron_l0moe.conversion.megatron_checkpoint import CheckpointReader
from megatron_l0moe.conversion.safetensors_files import (
    MAX_SHARD_BYTES,
    SafetensorsWriter,
    refuse_existing_checkpoint,
)
from megatron_l0moe.data.manifest import write_text
from megatron_l0moe.errors import L0MoEError

logger = logging.getLogger(__name__)

LOG_SECONDS = 5.0
# Everything beside weights and config that a server needs; what the base lacks is not written.
COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Padded rows of these belong to no token: Megatron rounds the vocabulary up to a multiple of TP * 128.
_VOCABULARY_TENSORS = ("embedding.word_embeddings.weight", "output_layer.weight")


def export_dense(
    megatron: Path, hf_base: Path, out: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, object]:
    """Write a dense Megatron checkpoint as Hugging Face model of the base's family.

    Args:
        megatron: folder with `latest_checkpointed_iteration.txt`.
        hf_base: the Hugging Face checkpoint that it was converted from: config and tokenizer.
        out: folder without a checkpoint.
        max_shard_bytes: size at which a new safetensors file is begun.
    """
    architecture = Architecture.from_hf(hf_base)
    source = _Source(megatron, architecture)
    rules = dense_rules(architecture)
    config = architecture.hf_config(source.dtype_name)
    return _export(source, rules, config, hf_base, out, max_shard_bytes)


def export_moe(
    megatron: Path,
    hf_base: Path,
    out: Path,
    *,
    dense_layers: int,
    top_k: int,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, object]:
    """Write an L0-MoE Megatron checkpoint as `Ernie4_5_MoeForCausalLM`.

    Args:
        megatron: folder with `latest_checkpointed_iteration.txt`.
        hf_base: the dense Hugging Face checkpoint that the run began with: sizes and tokenizer.
        out: folder without a checkpoint.
        dense_layers: bottom layers without experts.
        top_k: experts that serve one token; their weights sum to 1.
        max_shard_bytes: size at which a new safetensors file is begun.

    Returns:
        Numbers for the manifest: parameters, expert width, files' bytes, seconds.

    Raises:
        L0MoEError: a checkpoint of another shape, NaN weights, or a base that this layout cannot express.
    """
    architecture = Architecture.from_hf(hf_base)
    if architecture.qkv_bias:
        raise L0MoEError(
            f"{hf_base} is a {architecture.family} model with q/k/v biases, which the Ernie4.5-MoE layout cannot "
            "express on every engine; only Llama and Mistral bases can be exported as L0-MoE."
        )
    source = _Source(megatron, architecture)
    moe = source.moe_shape(dense_layers, top_k)
    rules = ernie_moe_rules(architecture, moe)
    config = ernie_config(architecture, moe, source.dtype_name)
    result = _export(source, rules, config, hf_base, out, max_shard_bytes)
    return {**result, "num_experts": moe.num_experts, "expert_ffn": moe.expert_ffn}


def ernie_config(architecture: Architecture, moe: MoEShape, dtype: str) -> dict[str, Any]:
    """Return config.json of the Ernie4.5-MoE layout in the transformers 4.57 form."""
    base = architecture.hf_config(dtype)
    for key in ("attention_bias", "mlp_bias", "sliding_window", "use_sliding_window"):
        base.pop(key, None)
    return {
        **base,
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        # Explicit: the layout's default is true.
        "tie_word_embeddings": architecture.tied_embeddings,
        "use_bias": False,
        "moe_intermediate_size": moe.expert_ffn,
        "moe_k": moe.top_k,
        "moe_num_experts": moe.num_experts,
        "moe_num_shared_experts": 0,
        "moe_layer_start_index": moe.dense_layers,
        "moe_layer_end_index": architecture.num_layers - 1,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "output_router_logits": False,
    }


class _Source:
    """A Megatron checkpoint seen as a model of one architecture."""

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        self.reader = CheckpointReader(folder)
        self.architecture = architecture
        self._model_names = {name for name in self.reader.model_names() if not is_training_state(name)}
        self.dtype_name = _DTYPE_NAMES[self.reader.dtype(_VOCABULARY_TENSORS[0])]

    def moe_shape(self, dense_layers: int, top_k: int) -> MoEShape:
        layers = self.architecture.num_layers
        if not 0 <= dense_layers < layers:
            raise L0MoEError(
                f"dense_layers ({dense_layers}) must be at least 0 and below the {layers} layers."
            )
        name = f"decoder.layers.{dense_layers}.mlp.experts.experts.linear_fc2.weight"
        shape = self.reader.shapes.get(name)
        if shape is None:
            raise L0MoEError(
                f"{self.reader.path} has no experts in layer {dense_layers} (no {name}); check dense_layers "
                f"({dense_layers}) and that this is the checkpoint of the moe or assemble stage."
            )
        if not 1 <= top_k <= shape[0]:
            raise L0MoEError(f"top_k ({top_k}) must be between 1 and the number of experts ({shape[0]}).")
        return MoEShape(dense_layers=dense_layers, num_experts=shape[0], expert_ffn=shape[2], top_k=top_k)

    def check(self, rules: list[Rule]) -> None:
        expected = megatron_shapes(rules)
        where = str(self.reader.path)
        check_names(self._model_names, set(expected), where)
        for name in expected:
            shape = self.reader.shapes[name]
            if name in _VOCABULARY_TENSORS and shape[0] > self.architecture.vocab_size:
                logger.info("%s: dropping %d rows of padding", name, shape[0] - self.architecture.vocab_size)
                shape = (self.architecture.vocab_size, *shape[1:])
            check_shape(name, shape, expected, where)

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        tensor = self.reader.read(name, row)
        return tensor[: self.architecture.vocab_size] if name in _VOCABULARY_TENSORS else tensor


def _export(
    source: _Source,
    rules: list[Rule],
    config: dict[str, Any],
    hf_base: Path,
    out: Path,
    max_shard_bytes: int,
) -> dict[str, object]:
    """Write weights, then tokenizer files, then config.json, which makes the folder a checkpoint."""
    start = logged = time.monotonic()
    refuse_existing_checkpoint(out)
    source.check(rules)
    shapes = hf_shapes(rules)
    parameters = 0
    with SafetensorsWriter(out, shapes, max_shard_bytes) as writer:
        for done, rule in enumerate(rules):
            for name, tensor in rule.to_hf(source.read):
                check_shape(name, tensor.shape, shapes, str(out))
                writer.write(name, tensor)
                parameters += tensor.numel()
            if time.monotonic() - logged > LOG_SECONDS:
                logged = time.monotonic()
                logger.info("%d of %d rules", done + 1, len(rules))
    for name in COPIED_FILES:
        if (hf_base / name).is_file():
            shutil.copyfile(hf_base / name, out / name)
    write_text(out / "config.json", json.dumps(_with_token_ids(config, hf_base), indent=2) + "\n")
    seconds = time.monotonic() - start
    logger.info("exported %d parameters to %s in %.1f s", parameters, out, seconds)
    return {
        "parameters": parameters,
        "tensors": len(shapes),
        "bytes": sum(file.stat().st_size for file in out.glob("*.safetensors")),
        "seconds": seconds,
        "dtype": source.dtype_name,
    }


def _with_token_ids(config: dict[str, Any], hf_base: Path) -> dict[str, Any]:
    base = read_config(hf_base)
    # Also when null: a layout's own default would be another model's token.
    ids = {key: base.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {**config, **ids}

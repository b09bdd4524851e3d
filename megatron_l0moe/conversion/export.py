"""Write Megatron checkpoints as Hugging Face checkpoints, a block of rows at a time; only a DSMoE needs custom code.

A dense model is written in its own family's layout; an L0-MoE in the layout that the wanted engines compute rightly
(`targets.py`): Ernie4.5-MoE or Qwen2-MoE, with SwiGLU experts, a softmax router, dense layers first, no shared expert,
no q/k norm. Ernie rotates q and k in neighbour pairs, so their rows are reordered; the scores do not change.
"""

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch

from megatron_l0moe.checkpoints.families import MoEShape, dense_rules, is_training_state
from megatron_l0moe.checkpoints.rules import Rule, check_names, check_shape, hf_shapes, megatron_shapes
from megatron_l0moe.checkpoints.safetensors_files import (
    MAX_SHARD_BYTES,
    SafetensorsWriter,
    refuse_existing_checkpoint,
)
from megatron_l0moe.checkpoints.torch_dist import CheckpointReader
from megatron_l0moe.conversion import targets
from megatron_l0moe.conversion.companions import (
    check_tokenizer,
    copy_licence,
    copy_tokenizer,
    token_ids,
    tokenizer_files,
    write_generation_config,
)
from megatron_l0moe.conversion.dsmoe_layout import (
    MODELLING_FILE,
    BlockShape,
    dsmoe_config,
    dsmoe_rules,
    modelling_text,
)
from megatron_l0moe.conversion.model_card import CardFacts, dsmoe_card, model_card, mom_card, recipe_facts
from megatron_l0moe.conversion.moe_layouts import LAYOUTS
from megatron_l0moe.conversion.mom_layout import MaskShape, mom_config, mom_rules
from megatron_l0moe.conversion.targets import Target
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.recipe import Recipe
from megatron_l0moe.runs.stage_folder import write_text
from megatron_l0moe.runtime.platform import keep_freed_memory
from megatron_l0moe.sizes.architecture import Architecture

logger = logging.getLogger(__name__)

LOG_SECONDS = 5.0
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Padded rows of these belong to no token: Megatron rounds the vocabulary up to a multiple of TP * 128.
_VOCABULARY_TENSORS = ("embedding.word_embeddings.weight", "output_layer.weight")
_COMPARED_ARGUMENTS = (
    *("num_attention_heads", "num_query_groups", "kv_channels", "rotary_base"),
    *("use_rope_scaling", "rope_scaling_factor", "norm_epsilon", "layernorm_epsilon"),
)
# Of the router; every layout computes a plain softmax.
_ROUTER_ARGUMENTS = {"moe_router_score_function": "softmax", "moe_router_topk_scaling_factor": None}


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
    target: Target = "all",
    card: CardFacts | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, object]:
    """Write an L0-MoE Megatron checkpoint in the layouts that the target's engines compute rightly.

    Args:
        megatron: folder with `latest_checkpointed_iteration.txt`.
        hf_base: the dense Hugging Face checkpoint that the run began with: sizes, tokenizer, licence.
        out: folder without a checkpoint; a second layout, if one is needed, lies below it.
        dense_layers: bottom layers without experts.
        top_k: experts that serve one token.
        target: the engines to serve.
        card: what the model card says beside the model's sizes.
        max_shard_bytes: size at which a new safetensors file is begun.

    Returns:
        Numbers for the manifest: parameters, expert width, files' bytes, seconds, the layouts and their engines.

    Raises:
        L0MoEError: a checkpoint of another shape, NaN weights, or a model that an engine has no layout for.
    """
    architecture = Architecture.from_hf(hf_base)
    source = _Source(megatron, architecture)
    moe = source.moe_shape(dense_layers, top_k)
    planned = targets.plan(target, targets.Model.of(architecture, renormalised=moe.renormalised))
    for one in planned:
        refuse_existing_checkpoint(out / one.folder)
    results = []
    for one in reversed(planned):  # the export's own folder last: it says that all are there
        layout = LAYOUTS[one.form]
        rules = layout.rules(architecture, moe)
        config = layout.hf_config(architecture, moe, source.dtype_name, one.engines)
        logger.info("writing %s for %s", layout.hf_architecture, ", ".join(one.engines))
        folder = out / one.folder
        card_of_this = model_card(config, hf_base, card or CardFacts())
        results.append(_export(source, rules, config, hf_base, folder, max_shard_bytes, card_of_this))
    written = {one.folder or ".": {"form": one.form, "engines": list(one.engines)} for one in planned}
    return {
        **results[-1],
        "num_experts": moe.num_experts,
        "expert_ffn": moe.expert_ffn,
        "target": target,
        "folders": written,
    }


def export_dsmoe(
    megatron: Path,
    hf_base: Path,
    out: Path,
    *,
    card: CardFacts | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, object]:
    """Write a DSMoE Megatron checkpoint with its modelling file, for transformers with `trust_remote_code=True`.

    Args:
        megatron: folder with `latest_checkpointed_iteration.txt`.
        hf_base: the dense Hugging Face checkpoint that the run began with.
        out: folder without a checkpoint.
        card: what the model card says beside the model's sizes.
        max_shard_bytes: size at which a new safetensors file is begun.

    Raises:
        L0MoEError: a checkpoint of another stage or shape, or NaN weights.
    """
    architecture = Architecture.from_hf(hf_base)
    source = _Source(megatron, architecture)
    shape = BlockShape.from_settings(source.reader.settings, source.reader.path)
    config = dsmoe_config(architecture, shape, source.dtype_name)
    return _export(
        source,
        dsmoe_rules(architecture, shape),
        config,
        hf_base,
        out,
        max_shard_bytes,
        dsmoe_card(config, hf_base, card or CardFacts()),
        code=modelling_text(architecture.family),
    )


def export_mom(
    megatron: Path,
    hf_base: Path,
    out: Path,
    *,
    card: CardFacts | None = None,
    width_multiple: int = 16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, object]:
    """Write a frozen Mixture-of-Masks as Ernie4.5-MoE: what all masks keep is a shared expert, the rest routed ones.

    Args:
        megatron: folder with `latest_checkpointed_iteration.txt`.
        hf_base: the dense Hugging Face checkpoint that the run began with.
        out: folder without a checkpoint.
        card: what the model card says beside the model's sizes.
        width_multiple: what the experts' common width is rounded up to, for kernels and tensor parallelism.
        max_shard_bytes: size at which a new safetensors file is begun.

    Returns:
        Numbers for the manifest, with the common width and the units of each layer before they were filled up.

    Raises:
        L0MoEError: a checkpoint of another stage or shape, masks that are not frozen, NaN weights.
    """
    architecture = Architecture.from_hf(hf_base)
    source = _Source(megatron, architecture)
    shape = MaskShape.from_checkpoint(source.reader, architecture, multiple=width_multiple)
    config = mom_config(architecture, shape, source.dtype_name)
    rules = mom_rules(architecture, shape)
    text = mom_card(config, shape.counts, hf_base, card or CardFacts())
    result = _export(source, rules, config, hf_base, out, max_shard_bytes, text)
    widths = {"expert_ffn": shape.widths.expert, "num_shared_experts": shape.widths.num_shared}
    return {**result, "num_experts": shape.masks, **widths, "units": shape.counts}


class _Source:
    """A Megatron checkpoint seen as a model of one architecture."""

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        self.reader = CheckpointReader(folder)
        self.architecture = architecture
        self._model_names = {name for name in self.reader.model_names() if not is_training_state(name)}
        self._arguments = vars(self.reader.common["args"]) if "args" in self.reader.common else {}
        self._check_arguments()
        dtype = self.reader.dtype(_VOCABULARY_TENSORS[0])
        if dtype not in _DTYPE_NAMES:
            raise L0MoEError(
                f"{self.reader.path} holds weights of {dtype}; only {', '.join(_DTYPE_NAMES.values())} can be exported."
            )
        self.dtype_name = _DTYPE_NAMES[dtype]

    def _check_arguments(self) -> None:
        """Compare what shapes of tensors do not tell: the wrong base would give a model that loads and is wrong."""
        expected = self.architecture.megatron_arguments()
        expected["layernorm_epsilon"] = expected["norm_epsilon"]  # what Megatron's own parser calls it
        for name in _COMPARED_ARGUMENTS:
            if name in self._arguments and self._arguments[name] != expected[name]:
                raise L0MoEError(
                    f"{self.reader.path} was made with {name} = {self._arguments[name]}, but the base model has "
                    f"{expected[name]}; give the base model that the run began with."
                )

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
        return MoEShape(
            dense_layers=dense_layers,
            num_experts=shape[0],
            expert_ffn=shape[2],
            top_k=top_k,
            renormalised=self._renormalised(top_k),
        )

    def _renormalised(self, top_k: int) -> bool:
        """Return whether the top-k weights sum to 1, and refuse routers that no layout can express."""
        for name, expected in (("moe_router_topk", top_k), *_ROUTER_ARGUMENTS.items()):
            value = self._arguments.get(name, expected)
            if value != expected:
                raise L0MoEError(
                    f"{self.reader.path} was trained with {name} = {value}, but only {expected} can be exported here."
                )
        return not self._arguments.get("moe_router_pre_softmax", False)

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


def _export(
    source: _Source,
    rules: list[Rule],
    config: dict[str, Any],
    hf_base: Path,
    out: Path,
    max_shard_bytes: int,
    card: str | None = None,
    code: str | None = None,
) -> dict[str, object]:
    """Write weights, then what lies beside them, then config.json, which makes the folder a checkpoint."""
    start = logged = time.monotonic()
    keep_freed_memory()
    refuse_existing_checkpoint(out)
    source.check(rules)
    ids = token_ids(hf_base)
    if files := tokenizer_files(hf_base):  # before the work; what is copied later are these files
        check_tokenizer(hf_base, files, _without_code({**config, **ids}, source.architecture))
    shapes = hf_shapes(rules)
    parameters = 0
    with SafetensorsWriter(out, shapes, max_shard_bytes) as writer:
        for done, rule in enumerate(rules):
            for piece in rule.to_hf(source.reader.read):  # rows of padding are never asked for
                check_shape(piece.name, piece.shape, shapes, str(out))
                writer.write(piece.name, piece.tensor, begin=piece.begin, rows=piece.total_rows)
                parameters += piece.tensor.numel()
            if time.monotonic() - logged > LOG_SECONDS:
                logged = time.monotonic()
                logger.info("%d of %d rules", done + 1, len(rules))
    copy_tokenizer(hf_base, out)
    write_generation_config(hf_base, out, ids)
    if card is not None:
        copy_licence(hf_base, out)
        write_text(out / "README.md", card)
    if code is not None:
        write_text(out / MODELLING_FILE, code)
    write_text(out / "config.json", json.dumps({**config, **ids}, indent=2) + "\n")
    seconds = time.monotonic() - start
    logger.info("exported %d parameters to %s in %.1f s", parameters, out, seconds)
    return {
        "parameters": parameters,
        "tensors": len(shapes),
        "bytes": sum(file.stat().st_size for file in out.glob("*.safetensors")),
        "seconds": seconds,
        "dtype": source.dtype_name,
    }


def _without_code(config: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Return a config.json that transformers takes without the export's own code."""
    own = {key: value for key, value in config.items() if key != "auto_map"}
    return own if "auto_map" not in config else {**own, "model_type": architecture.family}


def export_run(recipe: Recipe, checkpoints: Path, out: Path) -> dict[str, object]:
    """Export the checkpoints of the stage `moe` to the folder `out`; returns numbers for the manifest."""
    base, card = Path(recipe.model.path), recipe_facts(recipe)
    if recipe.method == "dsmoe":
        return export_dsmoe(checkpoints, base, out, card=card)
    if recipe.method == "mom":
        return export_mom(checkpoints, base, out, card=card)
    return export_moe(
        checkpoints,
        base,
        out,
        dense_layers=recipe.model.dense_layers,
        top_k=recipe.model.top_k,
        target=recipe.export.target,
        card=card,
    )

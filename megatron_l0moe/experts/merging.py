"""The stage `assemble`: a dense checkpoint and K expert files become a Megatron MoE checkpoint.

K = experts, E = units of an expert, F = units of a dense layer, H = hidden. In memory is one expert of one layer,
and where experts are lists of units the layer's dense MLP too.
"""

import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_l0moe.checkpoints.families import MoEShape, extra_states, moe_arguments
from megatron_l0moe.checkpoints.rules import Piece, Rename
from megatron_l0moe.checkpoints.torch_dist import (
    MEGATRON_FOLDER,
    CheckpointReader,
    CheckpointWriter,
    common_state,
)
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.experts.expert_file import WEIGHTS, ExpertFile, cut_units, fingerprint
from megatron_l0moe.experts.extraction import chance_iou, overlap
from megatron_l0moe.modules.tensor_parallel import keyed_generator
from megatron_l0moe.recipe.sections import RouterInit
from megatron_l0moe.runs.stage_folder import write_text
from megatron_l0moe.runtime.platform import keep_freed_memory
from megatron_l0moe.sizes.architecture import Architecture

logger = logging.getLogger(__name__)

NORMAL_STD = 0.02
LOG_SECONDS = 5.0
_MLP_TENSOR = re.compile(r"decoder\.layers\.(\d+)\.mlp\.(.+)")
_MLP_NORM = "linear_fc1.layer_norm_weight"


def assemble(
    dense: Path,
    experts: Sequence[Path],
    out: Path,
    *,
    top_k: int,
    router_init: RouterInit = "domain_mean",
    seed: int = 1234,
    num_experts: int | None = None,
) -> dict[str, object]:
    """Write `out/megatron`, the L0-MoE before its training, and `out/summary.json` with the returned numbers.

    Attention, norms, embeddings and the bottom layers come from the dense checkpoint, MLPs from the experts; of
    experts without weights (runs that trained masks only) their units are cut out of the dense checkpoint here.

    Args:
        dense: the Megatron checkpoint that all expert runs began with.
        experts: expert files; expert k of the MoE is the k-th.
        out: folder without a checkpoint.
        top_k: experts that serve one token.
        router_init: `domain_mean` (centred, normalised means of the layer's input over each domain) or
            `normal` (0, 0.02); both fp32.
        seed: of `normal`.
        num_experts: K, checked when given.

    Returns:
        iou (mean over pairs), iou_matrix and coverage by layer, chance_iou, and the numbers of the manifest.

    Raises:
        L0MoEError: K, widths, layers or hidden size do not fit each other, or units are of another dense model.
    """
    start = logged = time.monotonic()
    keep_freed_memory()
    source = CheckpointReader(dense)
    architecture = _architecture(source)
    files = [ExpertFile(file) for file in experts]
    moe = _check(files, architecture, top_k, num_experts)
    common = common_state(
        {**architecture.megatron_arguments(), **moe_arguments(architecture, moe)},
        {"stage": "moe", "architecture": asdict(architecture), **asdict(moe), "router_init": router_init},
        source.shapes["embedding.word_embeddings.weight"][0],
    )
    iou: dict[str, float] = {}
    iou_matrix: dict[str, list[list[float]]] = {}
    coverage: dict[str, float] = {}
    with CheckpointWriter(out / MEGATRON_FOLDER, common) as writer:
        for name in sorted(source.model_names()):
            target = _target_name(name, moe.dense_layers)
            if target is not None:
                for piece in Rename(megatron=target, hf=name, shape=source.shapes[name]).to_megatron(
                    source.read
                ):
                    writer.write_piece(piece)
        for layer in files[0].layers:
            router = _router(files, layer, router_init, seed)
            writer.write(f"decoder.layers.{layer}.mlp.router.weight", router)
            _write_experts(writer, files, layer, source)
            layer_overlap = overlap(
                [file.read(layer, "units") for file in files], architecture.ffn_hidden_size
            )
            iou[str(layer)] = layer_overlap.mean_iou
            iou_matrix[str(layer)] = layer_overlap.iou_matrix
            coverage[str(layer)] = layer_overlap.coverage
            if time.monotonic() - logged > LOG_SECONDS:
                logged = time.monotonic()
                logger.info("merged layer %d of %d", layer + 1, architecture.num_layers)
        for name, shards in extra_states(architecture, moe).items():
            writer.write_empty_state(name, shards)
    result: dict[str, object] = {
        "num_experts": moe.num_experts,
        "expert_ffn": moe.expert_ffn,
        "dense_layers": moe.dense_layers,
        "width_per_layer": {str(layer): [file.width for file in files] for layer in files[0].layers},
        "router_init": router_init,
        "iou": iou,
        "iou_matrix": iou_matrix,
        "coverage": coverage,
        "chance_iou": chance_iou(moe.expert_ffn, architecture.ffn_hidden_size),
        "seconds": time.monotonic() - start,
    }
    write_text(out / "summary.json", json.dumps(result, indent=2) + "\n")
    return result


def domain_mean_router(means: torch.Tensor) -> torch.Tensor:
    """Return router rows fp32 [K, H]: the domains' means [K, H] minus their common mean, each of length 1."""
    centred = means.float() - means.float().mean(0)
    norms = centred.norm(dim=1, keepdim=True)
    if not bool((norms > 0).all()):
        k = int((norms.flatten() <= 0).nonzero()[0])
        raise L0MoEError(
            f"The domain mean of expert {k} equals the mean of all domains (or was never measured), so it gives "
            "no router direction; use router_init 'normal' or train the experts on different data."
        )
    rows: torch.Tensor = centred / norms
    return rows


def _router(files: Sequence[ExpertFile], layer: int, init: RouterInit, seed: int) -> torch.Tensor:
    if init == "domain_mean":
        return domain_mean_router(torch.stack([file.read(layer, "input_mean") for file in files]))
    generator = keyed_generator(seed, layer)
    return torch.randn(len(files), files[0].hidden, generator=generator) * NORMAL_STD


def _write_experts(
    writer: CheckpointWriter, files: Sequence[ExpertFile], layer: int, source: CheckpointReader
) -> None:
    prefix = f"decoder.layers.{layer}.mlp.experts.experts"
    dense = None if files[0].has_weights else _DenseMLP(source, layer)
    for k, file in enumerate(files):
        parts = {p: file.read(layer, p) for p in WEIGHTS} if dense is None else dense.cut(file)
        fc1 = torch.cat([parts["gate"], parts["up"]])  # [2E, H]
        for name, tensor in (("linear_fc1", fc1), ("linear_fc2", parts["down"])):
            piece = Piece(name=f"{prefix}.{name}.weight", tensor=tensor[None], begin=k, total_rows=len(files))
            writer.write_piece(piece)


class _DenseMLP:
    """The MLP of one dense layer, out of which experts without weights of their own are cut."""

    def __init__(self, source: CheckpointReader, layer: int) -> None:
        self.layer = layer
        prefix = f"decoder.layers.{layer}.mlp.linear_"
        self._fc1 = source.read(f"{prefix}fc1.weight")  # [2F, H], gate then up
        self._fc2 = source.read(f"{prefix}fc2.weight")  # [H, F]
        self._fingerprint = fingerprint(self._fc1, self._fc2)

    def cut(self, file: ExpertFile) -> dict[str, torch.Tensor]:
        """Return the weights of an expert's units."""
        assert file.fingerprints is not None
        units, last = file.read(self.layer, "units"), self._fc2.shape[1] - 1
        if self._fingerprint != file.fingerprints[self.layer]:
            raise L0MoEError(
                f"{file.file} lists units of layer {self.layer} of another dense model than the checkpoint that is "
                "given; assemble with the checkpoint that the expert runs began with."
            )
        if not bool((units.diff() > 0).all()) or int(units[0]) < 0 or int(units[-1]) > last:
            raise L0MoEError(
                f"{file.file} lists units of layer {self.layer} that are not ascending numbers from 0 to {last}; "
                "extract the expert again."
            )
        return cut_units(self._fc1, self._fc2, units)


def _target_name(name: str, dense_layers: int) -> str | None:
    """Return the MoE checkpoint's name of a dense tensor; None for the MLPs that the experts replace."""
    match = _MLP_TENSOR.fullmatch(name)
    if match is None or int(match[1]) < dense_layers:
        return name
    if match[2] == _MLP_NORM:
        return f"decoder.layers.{match[1]}.pre_mlp_layernorm.weight"
    return None


def _architecture(source: CheckpointReader) -> Architecture:
    settings = source.settings
    if settings.get("stage") != "dense":
        raise L0MoEError(f"{source.path} is not a dense checkpoint of the stage `convert`.")
    return Architecture(**settings["architecture"])


def _check(
    files: Sequence[ExpertFile], architecture: Architecture, top_k: int, num_experts: int | None
) -> MoEShape:
    if len(files) < 2 or (num_experts is not None and len(files) != num_experts):
        wanted = (
            f"{num_experts} experts are asked for" if num_experts is not None else "at least 2 are needed"
        )
        raise L0MoEError(f"{len(files)} expert files were given, but {wanted}; run all expert jobs first.")
    if not 1 <= top_k <= len(files):
        raise L0MoEError(f"top_k ({top_k}) must be between 1 and the number of experts ({len(files)}).")
    first = files[0]
    for file in files:
        if file.width != first.width:
            raise L0MoEError(
                f"{file.file} has {file.width} units a layer, but {first.file} has {first.width}; extract all "
                "experts with one width."
            )
        if file.layers != first.layers:
            raise L0MoEError(
                f"{file.file} has other MoE layers than {first.file}; train all with one setting."
            )
        if file.has_weights != first.has_weights:
            with_weights, without = (file, first) if file.has_weights else (first, file)
            raise L0MoEError(
                f"{with_weights.file} holds weights and {without.file} only units; train all experts with one setting "
                "of --l0-train-weights."
            )
        if file.hidden != architecture.hidden_size:
            raise L0MoEError(
                f"{file.file} has hidden size {file.hidden}, but the dense model has {architecture.hidden_size}; "
                "it was cut out of another model."
            )
    if first.layers != list(range(first.layers[0], architecture.num_layers)):
        raise L0MoEError(
            f"{first.file} has the MoE layers {first.layers}, but they must be the top layers of the dense model, "
            f"up to {architecture.num_layers - 1}."
        )
    return MoEShape(dense_layers=first.layers[0], num_experts=len(files), expert_ffn=first.width, top_k=top_k)

"""The evaluate stage: perplexity, load of experts or blocks, and speed; each written as soon as it is known.

Parity compares Megatron's logits with those of the exported model, in float32, on real held-out text.

Shapes: N = positions, V = vocabulary.
"""

import gc
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_l0moe.conversion.export import export_moe
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.evaluation.loads import OpenBlocks, RouterLoad
from megatron_l0moe.evaluation.models import load_model
from megatron_l0moe.evaluation.perplexity import PerplexityTable, measure
from megatron_l0moe.evaluation.timing import measure_speed
from megatron_l0moe.index.heldout_file import HeldoutSequence, read_heldout
from megatron_l0moe.methods.method import method_of
from megatron_l0moe.recipe.recipe import Recipe
from megatron_l0moe.runs.stage_folder import write_json
from megatron_l0moe.runtime.cpu import device
from megatron_l0moe.sizes.architecture import read_config
from megatron_l0moe.sizes.parameters import ParameterCounts, count_parameters

logger = logging.getLogger(__name__)

LOGIT_ATOL = 1e-4
"""Largest difference of two float32 programs that sum in different orders, over 30 layers; measured: about 1e-5."""
NEAR_TIE_MARGIN = 1e-4
"""Relative gap of router probabilities that float32 rounding of the layers before can close."""

LARGEST_NEAR_TIE_SHARE = 0.25
"""Share of positions that near-ties may excuse: a wrong export is wrong everywhere."""


def compare_logits(reference: Tensor, logits: Tensor, margins: Tensor) -> dict[str, Any]:
    """Compare logits [N, V] position by position.

    A difference above the tolerance is put down to a router near-tie only where the routers really were that close
    (``margins`` [N]) at that position or an earlier one, which attention carries on; such positions are named and
    left out of ``max_abs``.

    Raises:
        L0MoEError: logits that are not finite, or more near-ties than there can be.
    """
    if not bool(torch.isfinite(reference).all() and torch.isfinite(logits).all()):
        raise L0MoEError(
            "The logits of Megatron or of the exported model are not finite; the training has diverged."
        )
    differences = (reference - logits).abs().amax(dim=-1)
    near_ties: list[dict[str, float | int]] = []
    compared: list[float] = []
    closest = float("inf")
    for position, difference in enumerate(differences.tolist()):
        closest = min(closest, float(margins[position]))
        if difference > LOGIT_ATOL and closest < NEAR_TIE_MARGIN:
            near_ties.append({"position": position, "difference": difference, "margin": closest})
        else:
            compared.append(difference)
    if len(near_ties) > len(differences) * LARGEST_NEAR_TIE_SHARE:
        raise L0MoEError(
            f"{len(near_ties)} of {len(differences)} positions differ between Megatron and the exported model, too "
            "many to be router near-ties; do not use the export, and report this as a bug."
        )
    return {
        "max_abs": max(compared, default=0.0),
        "median_abs": float(differences.median()),
        "positions": len(differences),
        "tolerance": LOGIT_ATOL,
        "near_ties": near_ties,
    }


@torch.no_grad()
def parity(megatron_logits: Path, export: Path) -> dict[str, Any]:
    """Return the comparison of a file that `training.logits` wrote with the export's own logits."""
    saved = load_file(megatron_logits)
    model = load_model(export, dtype="float32")
    logits = model(saved["tokens"][None]).logits[0].float()
    # Megatron pads the vocabulary to a multiple; the exported model has the real one.
    result = compare_logits(saved["logits"][:, : logits.shape[-1]], logits, saved["margins"])
    if result["max_abs"] > LOGIT_ATOL:
        raise L0MoEError(
            f"The exported model's logits differ from Megatron's by {result['max_abs']:.2e} "
            f"(at most {LOGIT_ATOL:.0e} is rounding); do not use {export}, and report this as a bug."
        )
    return result


def evaluate(recipe: Recipe, run: Path, out: Path) -> dict[str, object]:
    """Measure the dense model and the exported one; of an L0-MoE also the assembled one before MoE training.

    Args:
        recipe: names the dense model, the shapes, and the sizes of the speed test.
        run: the run folder; curate/, assemble/ and export/ are read.
        out: perplexity.json, router_load.json (of blocks: open_blocks.json) and speed.json are written here.

    Returns:
        The headline numbers.

    Raises:
        L0MoEError: a stage that this one reads has not run, or a model cannot be measured.
    """
    dense_dir, export_dir, method = Path(recipe.model.path), run / "export", recipe.method
    needed = {"export": export_dir}
    if method == "l0moe":
        needed = {"assemble": run / "assemble" / "megatron", **needed}
    for stage, folder in needed.items():
        if not folder.is_dir():
            raise L0MoEError(f"{folder} does not exist; run the {stage} stage first.")
    sequences = read_heldout(run / "curate" / "heldout.jsonl")
    dtype = recipe.evaluation.settled_dtype
    tables: dict[str, PerplexityTable] = {}
    seconds: dict[str, float] = {}

    def record(name: str, table: PerplexityTable, start: float) -> None:
        tables[name], seconds[name] = table, time.monotonic() - start
        write_json(out / "perplexity.json", {key: value.to_json() for key, value in tables.items()})
        logger.info("perplexity of %s: %.2f (%d tokens)", name, table.overall, table.tokens)

    if method == "l0moe":
        start = time.monotonic()
        record("l0moe_untrained", _untrained(recipe, run, out / "untrained", sequences), start)
    start = time.monotonic()
    dense = load_model(dense_dir, dtype=dtype, device=device())
    record("dense", measure(dense, sequences, name="dense"), start)
    start = time.monotonic()
    made = load_model(export_dir, dtype=dtype, device=device())
    with OpenBlocks(made) if method_of(method).opens_blocks else RouterLoad(made) as load:
        record(method, measure(made, sequences, counts=load, name=method), start)
    open_blocks = _write_load(load, out)

    start = time.monotonic()
    speed = measure_speed(
        dense,
        made,
        sequences,
        counts=(
            checkpoint_counts(dense_dir),
            method_of(method).exported_counts(read_config(export_dir), open_blocks),
        ),
        prefill_tokens=recipe.evaluation.prefill_tokens,
        decode_tokens=recipe.evaluation.decode_tokens,
        repeats=recipe.evaluation.repeats,
        name=method,
    )
    write_json(out / "speed.json", speed)
    seconds["speed"] = time.monotonic() - start
    return {
        "perplexity": {name: table.overall for name, table in tables.items()},
        "speed": {name: value for name, value in speed.items() if name.endswith("_ratio")},
        "seconds": seconds,
    }


def _write_load(load: RouterLoad | OpenBlocks, out: Path) -> float | None:
    """Write down which experts or blocks the held-out text used; returns the mean number of a token's open blocks."""
    by_layer = {str(layer): domains for layer, domains in load.fractions().items()}
    if isinstance(load, RouterLoad):
        write_json(out / "router_load.json", by_layer)
        return None
    mean_open = load.mean_open()
    write_json(out / "open_blocks.json", {"mean_open": mean_open, "layers": by_layer})
    return mean_open


def checkpoint_counts(folder: Path) -> ParameterCounts:
    """Count the parameters of a Hugging Face checkpoint folder from its config.json."""
    return count_parameters(read_config(folder))


def _untrained(
    recipe: Recipe, run: Path, folder: Path, sequences: Sequence[HeldoutSequence]
) -> PerplexityTable:
    """Export the assembled checkpoint to `folder`, measure it, and delete it again."""
    try:
        export_moe(
            run / "assemble" / "megatron",
            Path(recipe.model.path),
            folder,
            dense_layers=recipe.model.dense_layers,
            top_k=recipe.model.top_k,
            target="transformers",
        )
        model = load_model(folder, dtype=recipe.evaluation.settled_dtype, device=device())
        table = measure(model, sequences, name="l0moe_untrained")
        del model  # its files are mapped into memory: free them before the folder goes
        gc.collect()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return table

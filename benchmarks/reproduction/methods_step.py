"""Step `methods`: every run of the table, from the same base, and its held-out perplexity."""

import dataclasses
import json
import logging
import os
import shutil
import sys
from pathlib import Path

from base_step import STREAM, train_and_export
from joined_index import join
from results import HELDOUT, save
from runs_table import Case, RunsTable, chain_run
from settings import Place
from steps import alone, do
from tokenizer_step import llama_config
from training_record import record_chain, record_dense

from megatron_l0moe.checkpoints.torch_dist import MEGATRON_FOLDER
from megatron_l0moe.conversion.convert import convert_dense
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.methods.method import method_of
from megatron_l0moe.recipe.recipe import ModelMethod, section_hash
from megatron_l0moe.reports.collect import Json
from megatron_l0moe.runs.child_process import run_command
from megatron_l0moe.runs.stage_folder import (
    MARKER,
    StageFolder,
    input_digests,
    is_done,
    read_manifest,
    write_json,
    write_text,
)
from megatron_l0moe.runs.stages import Run, selection, stages

logger = logging.getLogger(__name__)

METHODS = "methods"
"""Folder of the runs."""
LAST = "export"
"""Stage until which a run of the chain goes."""
BATCH = 16
"""Sequences of one forward pass over the held-out text."""
CONVERTED = "converted"
"""Written when the conversion is whole."""


def run_case(place: Place, table: RunsTable, case: Case) -> None:
    """Do one run of the table, as far as it is not done."""
    run = chain_run(place, table, case)
    if case.settings.kind == "l0moe":
        for spec in selection(run.recipe.method, None, LAST):
            share_stage(place, run, spec.name)
        measure(place, case.name, run.stage_folder("export"), tokens_of(run), case.settings.method)
        record_chain(place, run)
        return
    share_stage(place, run, "curate")
    model = place.root / "base"
    if case.settings.kind == "dense-small":
        model = pretrained_small(place, run)
    _further(place, table, case, run, model)


def tokens_of(run: Run) -> int:
    """Return the tokens that a run learns from: of an L0-MoE K expert runs or calibration passes, then its training."""
    recipe = run.recipe
    if recipe.method != "l0moe":
        sequences = 0
    elif recipe.expert_training.method == "l0":
        sequences = recipe.expert_steps * recipe.expert_training.global_batch_size
    else:
        sequences = recipe.calibration_sequences
    expert = recipe.model.num_experts * sequences
    return (expert + recipe.moe_steps * recipe.moe_global_batch_size) * recipe.data.seq_length


def mean_active_ffn(run: Run, place: Place) -> int:
    """Return the units that serve a token in a layer of the L0-MoE, as a mean over the layers.

    Raises:
        L0MoEError: it is no whole number, so no dense model of one width has it.
    """
    model, base = run.recipe.model, place.own_base.model
    units = (
        model.dense_layers * base.ffn + (base.layers - model.dense_layers) * model.top_k * model.expert_ffn
    )
    if units % base.layers:
        raise L0MoEError(
            f"The L0-MoE's {units} active units do not spread evenly over {base.layers} layers, so no dense-small has "
            "them; change model.dense_layers or model.expert_ffn."
        )
    return units // base.layers


def pretrained_small(place: Place, run: Run) -> Path:
    """Pretrain a dense model of the L0-MoE's active width exactly as the base was; return its folder."""
    width = mean_active_ffn(run, place)
    own, base = place.own_base, place.own_base.training
    model = own.model.model_copy(update={"ffn": width})
    asked = section_hash(model, base.decisive)
    inputs = (place.root / "tokenizer", place.root / "tokens")
    stage = StageFolder("dense-small", place.root / METHODS / f"dense-small-{width}", asked, inputs)

    def work(out: Path) -> dict[str, object]:
        untrained = out / "untrained"
        shutil.copytree(place.root / "tokenizer", untrained, dirs_exist_ok=True)
        config = json.loads((untrained / "config.json").read_text(encoding="utf-8"))
        seq_length = place.settings.data.seq_length
        changed = llama_config(model, config["vocab_size"], seq_length, config["eos_token_id"])
        write_json(untrained / "config.json", changed)
        training = base.model_copy(update={"processes": 1})  # a run of the table takes one core
        return train_and_export(out, untrained, place.root / "tokens" / STREAM, training, seq_length)

    do(stage, "resume", work)
    return stage.folder


def _further(place: Place, table: RunsTable, case: Case, run: Run, model: Path) -> None:
    """Train a dense model on the sequences of an L0-MoE run."""
    seq_length = run.recipe.data.seq_length
    sequences = tokens_of(run) // seq_length
    # a last batch that would not be full is left out
    training = table.dense.training(case.settings, sequences // table.dense.global_batch_size, case.seed)
    asked = section_hash(case.settings.kind, training.decisive)
    stage = StageFolder(case.name, run.folder / "dense", asked, (model, run.stage_folder("curate")))

    def work(out: Path) -> dict[str, object]:
        start = out / "start"
        if not (start / CONVERTED).is_file():
            shutil.rmtree(start, ignore_errors=True)
            convert_dense(model / "hf", start)
            write_text(start / CONVERTED, "")
        found = join(run.stage_folder("curate"), run.recipe.model.num_experts, out / "stream")
        assert found == sequences, f"{found} sequences in the index, {sequences} expected"
        return train_and_export(
            out, model / "hf", out / "stream", training, seq_length, start=start / MEGATRON_FOLDER
        )

    do(stage, "resume", work)
    used = training.steps * training.global_batch_size * seq_length
    measure(place, case.name, stage.folder / "hf", used)
    record_dense(place, case.name, model, stage.folder)


def share_stage(place: Place, run: Run, name: str) -> None:
    """Do one stage, or take it from a run with the same settings and inputs, one process at a time."""
    made = stages(run, name)
    with alone(place.root / METHODS / f"{name}-{made[0].config_hash}"):
        for own in made:
            if not is_done(own):
                _link_twin(place, own)
        if not all(is_done(own) for own in made):
            logger.info("%s: %s ...", run.recipe.name, name)
            words = [sys.executable, "-m", "megatron_l0moe", "run", str(run.recipe_file)]
            words += ["--runs-dir", str(run.runs_dir), "--from", name, "--until", name]
            run_command(words, log=run.runs_dir / f"{run.recipe.name}.log")


def _link_twin(place: Place, own: StageFolder) -> None:
    relative = own.folder.relative_to(place.root / METHODS).parts[1:]
    for marker in sorted((place.root / METHODS).glob("/".join(("*", *relative, MARKER)))):
        found = dataclasses.replace(own, folder=marker.parent)
        if marker.read_text(encoding="utf-8").strip() != own.config_hash or not _is_from_these(found):
            continue
        logger.info("%s: as in %s", own.folder.relative_to(place.root), marker.parent.relative_to(place.root))
        partial = own.folder.with_name(f".{own.folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(own.folder, ignore_errors=True)
        shutil.copytree(marker.parent, partial, copy_function=os.link)
        partial.rename(own.folder)
        return


def _is_from_these(found: StageFolder) -> bool:
    """Say whether a finished stage of another run was made from the inputs that this run has."""
    if not all((folder / MARKER).is_file() for folder in found.inputs):
        return False
    return read_manifest(found.folder).get("inputs") == input_digests(found)


def measure(place: Place, name: str, model: Path, tokens: int, method: ModelMethod = "l0moe") -> None:
    """Write results/NAME: perplexity on the common held-out sequences, router load, parameters, tokens."""
    made = model.parent if model.name == "hf" else model  # the folder that has a manifest
    inputs = (made, place.root / "tokens")
    save(place, name, HELDOUT, section_hash(tokens), inputs, lambda: _measured(place, model, tokens, method))


def _measured(place: Place, folder: Path, tokens: int, method: ModelMethod) -> Json:
    import torch

    from megatron_l0moe.evaluation import perplexity
    from megatron_l0moe.evaluation.loads import OpenBlocks, RouterLoad
    from megatron_l0moe.evaluation.models import load_model
    from megatron_l0moe.index.heldout_file import read_heldout
    from megatron_l0moe.runtime.hardware import describe_machine

    model, sequences = load_model(folder), read_heldout(place.root / "tokens" / "heldout.jsonl")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    result: Json = {}
    if method == "dsmoe":
        with OpenBlocks(model) as blocks:
            table = perplexity.measure(model, sequences, batch=BATCH, counts=blocks)
        result["open_blocks"] = blocks.mean_open()
    elif "moe_num_experts" in config:
        with RouterLoad(model) as load:
            table = perplexity.measure(model, sequences, batch=BATCH, counts=load)
        result["router_load"] = {str(layer): shares for layer, shares in load.fractions().items()}
    else:
        table = perplexity.measure(model, sequences, batch=BATCH)
    counts = method_of(method).exported_counts(config, result.get("open_blocks"))
    return {
        "perplexity": table.to_json(),
        **result,
        "tokens": tokens,
        "parameters": counts.total,
        "active_parameters": counts.active,
        "machine": describe_machine(device="cpu", threads=torch.get_num_threads()),
    }

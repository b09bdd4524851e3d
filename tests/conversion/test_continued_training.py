"""An imported L0-MoE goes on training with the chain's own jobs, and is exported again with Megatron's logits."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conversion.toy_checkpoints import VOCAB
from conversion.toy_moe import DENSE_LAYERS, EXPERTS, TOP_K, WIDTH, export, make_moe, rewrite_megatron
from distributed.resume_world import SEQUENCE, STEPS, write_indexes
from toy_recipe import make_run

from megatron_l0moe.chain import training_commands
from megatron_l0moe.checkpoints.torch_dist import CheckpointReader
from megatron_l0moe.conversion.convert import convert_moe
from megatron_l0moe.conversion.export import export_moe
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.evaluation.evaluate import parity
from megatron_l0moe.runs.stages import Run
from megatron_l0moe.sizes.architecture import Architecture

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

POSITIONS = 32
BIAS = "decoder.layers.{}.self_attention.linear_qkv.bias"


def imported(folder: Path, family: str) -> tuple[Run, Architecture]:
    """A run folder whose assemble stage is an exported L0-MoE, with data for its MoE training."""
    make_moe(folder, family)
    export(folder)
    run = make_run(
        folder,
        model__path=str(folder / "hf"),
        model__dense_layers=DENSE_LAYERS,
        model__num_experts=EXPERTS,
        model__expert_ffn=WIDTH,
        model__top_k=TOP_K,
        data__seq_length=SEQUENCE,
        data__iterations=2,
        data__tokens_per_set=STEPS * EXPERTS * SEQUENCE,
        moe_training__learning_rate=0.01,
        evaluation__parity_positions=POSITIONS,
    )
    assert run.recipe.moe_steps == STEPS
    convert_moe(folder / "export", run.stage_folder("assemble"))
    write_indexes(run.stage_folder("curate"))
    run.stage_folder("moe").mkdir()
    tokens = torch.randint(0, VOCAB - 1, (POSITIONS,), generator=torch.Generator().manual_seed(0)).tolist()
    (run.stage_folder("curate") / "heldout.jsonl").write_text(
        json.dumps({"tokens": tokens, "domain": "a", "cluster": 0}) + "\n"
    )
    return run, Architecture.from_hf(folder / "hf")


def do(job: training_commands.TrainingCommand, log: Path) -> None:
    with log.open("w") as output:
        done = subprocess.run(
            job.command, env={**os.environ, **job.env}, stdout=output, stderr=output, check=False, timeout=300
        )
    assert done.returncode == 0, log.read_text()[-4000:]


def test_qwen2_keeps_and_trains_its_biases(tmp_path):
    run, architecture = imported(tmp_path, "qwen2")
    do(training_commands.moe_job(run, architecture), tmp_path / "train.log")
    trained, start = run.stage_folder("moe") / "checkpoints", run.stage_folder("assemble") / "megatron"
    for layer in range(architecture.num_layers):
        before, after = (CheckpointReader(path).read(BIAS.format(layer)) for path in (start, trained))
        assert before.abs().max() > 0
        assert 1e-4 < (before - after).abs().max() < 1
    losses = [
        json.loads(line)["lm_loss"]
        for line in (run.stage_folder("moe") / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    alone = training_commands.logits_job(run, architecture)
    # Inside of a pod or another torchrun: one process is one process, or it would wait for the other for ever.
    outer = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29999",
    }
    do(
        training_commands.TrainingCommand(command=alone.command, env=alone.env | outer),
        tmp_path / "logits.log",
    )
    export_moe(trained, tmp_path / "hf", tmp_path / "trained", dense_layers=DENSE_LAYERS, top_k=TOP_K)
    assert parity(training_commands.logits_file(run), tmp_path / "trained")["positions"] == POSITIONS
    with pytest.raises(L0MoEError, match="logits differ from Megatron's"):
        parity(training_commands.logits_file(run), tmp_path / "export")  # control: before this training


def test_llama_3_2_is_computed_with_its_own_rope_factor(tmp_path):
    """Fails without `rope_scaling_factor` in training/model.py: Megatron then takes 8 for 32."""
    run, architecture = imported(tmp_path, "llama3.2")
    assert architecture.rope_scaling["factor"] == 32
    counters = {
        f"decoder.layers.{layer}.mlp.router.expert_load.{name}": torch.zeros(EXPERTS)
        for layer in range(DENSE_LAYERS, architecture.num_layers)
        for name in ("counts", "load")
    }
    rewrite_megatron(run.folder, extra=counters)  # as if it had been trained
    shutil.copytree(run.stage_folder("assemble") / "megatron", run.stage_folder("moe") / "checkpoints")
    do(training_commands.logits_job(run, architecture), tmp_path / "logits.log")
    assert parity(training_commands.logits_file(run), tmp_path / "export")["positions"] == POSITIONS
    file = tmp_path / "export/config.json"
    config = json.loads(file.read_text())
    config["rope_scaling"]["factor"] = 8.0
    file.write_text(json.dumps(config))
    with pytest.raises(L0MoEError, match="logits differ from Megatron's"):
        parity(training_commands.logits_file(run), tmp_path / "export")  # control

"""The plan: numbers by hand, the exact commands, and no files written."""

import shlex
import sys
from pathlib import Path

from toy_recipe import CONFIG, make_run, write_model

from megatron_l0moe.chain import training_commands
from megatron_l0moe.chain.dry_run import describe, shell_line
from megatron_l0moe.runs.stages import CHAIN, Run
from megatron_l0moe.sizes.architecture import Architecture


def with_model(tmp_path: Path) -> Run:
    return make_run(tmp_path, model__path=str(write_model(tmp_path / "model")))


def test_numbers_by_hand(tmp_path: Path) -> None:
    text = "\n".join(describe(with_model(tmp_path), CHAIN))
    assert "4 layers, hidden 32, FFN 64, heads 4 / 2 KV of 8, vocabulary 128" in text
    assert "1 dense + 3 MoE layers of 4 experts of width 16 (dense FFN: 64), 2 for each token" in text
    assert "10 steps of 2 sequences of 32 tokens = 640 tokens for each expert" in text
    assert "20 steps of 4 sequences of 32 tokens = 2,560 tokens" in text
    assert "Q = 3 iterations of K = 4 clusters, sequences of 32 tokens" in text
    assert "2,560 for the experts (640 each), 2 ordered sets of 1,280" in text
    assert [line.split(":")[0] for line in text.splitlines() if line[:1].isdigit()] == [
        f"{number}. {spec.name}" for number, spec in enumerate(CHAIN, 1)
    ]


def test_sets_gone_through_again_are_said(tmp_path: Path) -> None:
    text = "\n".join(describe(make_run(tmp_path, data__set_passes=3), CHAIN))
    assert "2 ordered sets of 1,280 gone through 3 times, " in text
    assert "60 steps of 4 sequences" in text


def test_commands_are_those_that_run(tmp_path: Path) -> None:
    run = with_model(tmp_path)
    lines = describe(run, CHAIN)
    architecture = Architecture.from_config(CONFIG, Path("config.json"))
    assert any(
        line.strip() == shell_line(training_commands.expert_job(run, architecture, 0)) for line in lines
    )
    assert any(line.strip() == shell_line(training_commands.moe_job(run, architecture)) for line in lines)
    stage = shlex.join([sys.executable, "-m", "megatron_l0moe", "export", str(run.recipe_file)])
    assert any(line.strip().removeprefix("command").strip().startswith(stage) for line in lines)


def test_nothing_is_written(tmp_path: Path) -> None:
    describe(with_model(tmp_path), CHAIN)
    assert not (tmp_path / "runs").exists()


def test_missing_model_is_said_once(tmp_path: Path) -> None:
    text = "\n".join(describe(make_run(tmp_path), CHAIN))
    assert text.count("Model folder models/toy does not exist") == 1
    assert "not known without the model" in text
    assert "10 steps of 2 sequences" in text


def test_shell_line_leaves_batch_variables_to_the_shell(tmp_path: Path) -> None:
    run = make_run(tmp_path, moe_training__parallel={"processes": 2, "nodes": 2})
    line = shell_line(
        training_commands.moe_job(run, Architecture.from_config(CONFIG, Path("c")), python="python")
    )
    assert line.startswith(
        "OMP_NUM_THREADS=1 CUDA_DEVICE_MAX_CONNECTIONS=1 python -m torch.distributed.run --nnodes 2"
    )
    assert '--node-rank "$SLURM_NODEID" --master-addr "$head" --master-port "$port"' in line
    assert "--moe-layer-freq '([0]*1+[1]*3)'" in line

"""`l0moe plan`: what it prints and writes, what it refuses, and that it needs neither torch nor a model folder."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from megatron_l0moe import cli
from megatron_l0moe.commands import EXIT_USER_ERROR
from megatron_l0moe.plan.plan import find_architecture, recompute_of
from megatron_l0moe.sizes.flops import Recompute

EXAMPLES = Path(__file__).parents[2] / "examples"
LLAMA = EXAMPLES / "llama3_8b.yaml"
# Under 0.7 on an idle core of the machine that this was written on; a shared one may take twice as much.
CPU_SECONDS = 2.0


def plan(*words: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["plan", *map(str, words)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def changed(tmp_path: Path, section: str, **values: object) -> Path:
    """Return the Llama recipe with other keys in a section of its layouts on 64 GPUs."""
    raw = yaml.safe_load(LLAMA.read_text(encoding="utf-8"))
    raw["layouts"][64][section] |= values
    for name in ("expert_training", "moe_training"):
        raw[name]["learning_rate"] = 1e-4  # PyYAML alone reads 1e-4 as text
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return file


def test_prints_and_writes(tmp_path: Path) -> None:
    code, text = plan(LLAMA, "--gpus", "64", "--json", tmp_path / "plan.json")
    assert code == 0
    for words in (
        "23.14",
        "22.61",
        "25.1 / 3.2",
        "dp2,distopt",
        "fastest first",
        "Does not fit",
        "Nothing was run",
    ):
        assert words in text
    found = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert found["parameters"]["dense"]["total"] == 8_030_261_248
    moe, experts = found["stages"]["moe"], found["stages"]["experts"]
    assert (experts["jobs"], experts["steps"], moe["steps"]) == (64, 715, 20 * (900_000_000 // (128 * 4096)))
    assert moe["tokens"] == moe["steps"] * 128 * 4096
    hours = moe["model_flops"] / (0.25 * 989.4e12) / 3600
    assert moe["gpu_hours"] == pytest.approx(hours)
    assert 300 < hours + experts["gpu_hours"] < 1200  # "about a thousand"
    assert found["bytes"]["expert_store"] / 1e9 == pytest.approx(38.7, abs=0.05)
    assert moe["proposals"][0]["hours"] <= moe["proposals"][1]["hours"]
    assert moe["refused"][0]["excess_bytes"] > 0


def test_mfu_is_the_users(tmp_path: Path) -> None:
    hours = []
    for mfu in ("0.2", "0.4"):
        assert plan(LLAMA, "--mfu", mfu, "--json", tmp_path / "plan.json")[0] == 0
        hours.append(json.loads((tmp_path / "plan.json").read_text())["stages"]["moe"]["gpu_hours"])
    assert hours[0] == pytest.approx(2 * hours[1])


def test_a_layout_that_does_not_fit(tmp_path: Path) -> None:
    """Refused after the tables, with numbers and what would fit."""
    recipe = changed(tmp_path, "moe_training", parallel={"processes": 8, "tensor": 4})
    code, text = plan(recipe)
    assert code == EXIT_USER_ERROR
    last = text.strip().splitlines()[-1]
    assert last.startswith("moe_training.parallel: tp4,sp,dp2, recomputation none needs ")
    assert "more than the 72.8 that an H100 SXM 80 GB has" in last
    assert "the nearest that fits is tp4,sp,dp2,distopt, recomputation none (" in last
    assert "too much" in text


def test_a_layout_that_breaks_a_rule(tmp_path: Path) -> None:
    recipe = changed(tmp_path, "moe_training", parallel={"processes": 64, "tensor": 16})
    code, text = plan(recipe)
    assert (code, text.count("\n")) == (EXIT_USER_ERROR, 1)
    assert "moe_training.parallel.tensor (16) must divide the model's 8 KV heads" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpu", "v100"), "There is no GPU 'v100'"),
        (("--gpus", "12"), "--gpus (12) must be at most 8 or whole nodes of 8; use 8."),
    ],
)
def test_bad_options(words: tuple[str, ...], message: str) -> None:
    code, text = plan(LLAMA, *words)
    assert code == EXIT_USER_ERROR
    assert message in text
    assert text.count("\n") == 1


def test_unknown_model(tmp_path: Path) -> None:
    raw = LLAMA.read_text(encoding="utf-8").replace("models/Meta-Llama-3-8B", "models/nowhere")
    (tmp_path / "recipe.yaml").write_text(raw, encoding="utf-8")
    code, text = plan(tmp_path / "recipe.yaml")
    assert code == EXIT_USER_ERROR
    assert "models/nowhere does not exist" in text


def test_a_folder_wins_over_published_sizes(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen2-7B"
    assert "as published for Qwen2-7B" in find_architecture(str(folder))[1]
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    architecture, source = find_architecture(str(folder))
    assert architecture.hidden_size == 64
    assert source.endswith("config.json")


def test_recomputation_of_flags() -> None:
    assert recompute_of({}) == Recompute()
    full = {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 2}
    assert recompute_of(full).text == "full/2"
    assert recompute_of({"recompute-granularity": "selective"}).modules == ("core_attn",)
    assert recompute_of(full | {"recompute-method": "block"}) == Recompute()


def test_without_torch_and_quickly() -> None:
    code = (
        "import sys; from megatron_l0moe.cli import app; app([*sys.argv[1:]], standalone_mode=False); "
        "print(sorted({'torch', 'megatron', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", str(LLAMA), "--gpus", "64"],
        capture_output=True,
        text=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == "[]"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CPU_SECONDS

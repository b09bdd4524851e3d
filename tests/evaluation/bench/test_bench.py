"""`l0moe bench` on tiny models: structure, bounds, measured routing, and vLLM's worker with a vLLM that is made up."""

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from megatron_l0moe import cli
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.evaluation.bench.bench import (
    HEADER,
    BenchSettings,
    bench,
    markdown,
    parse_engine,
    rows,
    text_for,
)
from megatron_l0moe.evaluation.bench.vllm_runner import VllmRunner, worker_environment
from megatron_l0moe.evaluation.loads import DistinctExperts
from megatron_l0moe.evaluation.models import load_model
from megatron_l0moe.evaluation.timing import Mode

SMALL = {"repeats": 2, "prompt_tokens": 16, "prefill_batch": 2, "decode_tokens": 2, "batches": (1, 8)}

# Steps take no time: what is tested is who asks whom for what.
FAKE_VLLM = """
import json, os, sys
from types import SimpleNamespace


class SamplingParams(SimpleNamespace):
    pass


class Engine:
    def __init__(self):
        self.running = {}

    def add_request(self, name, prompt, settings):
        with open(os.environ["FAKE_LOG"], "a") as log:
            print(len(prompt["prompt_token_ids"]), settings.max_tokens, file=log)
        self.running[name] = [0, settings.max_tokens]

    def has_unfinished_requests(self):
        return bool(self.running)

    def step(self):
        done = []
        for name, state in list(self.running.items()):
            state[0] += 1
            done.append(SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=[0] * state[0])]))
            if state[0] == state[1]:
                del self.running[name]
        return done


class LLM:
    def __init__(self, **settings):
        print("settings", json.dumps(settings), flush=True)
        if settings["model"].endswith("broken"):
            sys.exit("no such model")
        self.llm_engine = Engine()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A Python whose vllm is the one above, and the log of its requests."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text(FAKE_VLLM)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "requests"))
    return python


def test_both_engines(models, fake):
    settings = BenchSettings(serve_python=fake, **SMALL)
    result = bench(*models, text_for(models[0], None, settings), settings)
    assert json.loads(json.dumps(result)) == result
    assert list(result["engines"]) == ["transformers", "vllm"]
    names = ["prefill", "first_token", "decode_b1", "decode_b8"]
    for engine in result["engines"].values():
        assert list(engine["modes"]) == names
        assert all(len(mode["ratio"]["pairs"]) == 2 for mode in engine["modes"].values())
    modes = result["engines"]["transformers"]["modes"]
    assert 2 <= modes["decode_b8"]["distinct_experts"]["measured"] <= 4
    assert modes["decode_b1"]["distinct_experts"] == {"uniform": 2, "measured": 2}
    assert modes["decode_b1"]["bounds"]["active"] == pytest.approx(modes["decode_b1"]["bounds"]["bytes"])
    assert modes["decode_b8"]["bounds"]["bytes"] < modes["decode_b8"]["bounds"]["active"]
    assert "measured" not in result["engines"]["vllm"]["modes"]["decode_b8"]["distinct_experts"]
    table = list(rows(result))
    assert len(table) == 8
    assert all(len(row) == len(HEADER) for row in table)
    assert markdown(result).count("\n| ") == 9


def test_what_vllm_is_asked(models, fake, tmp_path):
    with VllmRunner(
        models[0], settings={"dtype": "float32"}, python=fake, threads=1, log=tmp_path / "log"
    ) as runner:
        prefill = Mode(name="prefill", batch=2, tokens=16, prompt=0)
        assert runner([[1] * 16] * 2, prefill).seconds > 0
        decode = Mode(name="decode_b3", batch=3, tokens=4, prompt=8)
        assert runner([[1] * 12] * 3, decode).joules is None
    # prompts and tokens asked for: one more than the decode steps, the first comes of the prompt
    assert (tmp_path / "requests").read_text().split() == ["16", "1"] * 2 + ["8", "5"] * 3
    assert '"skip_tokenizer_init": true' in (tmp_path / "log").read_text()


def test_a_worker_that_ends_is_one_sentence(tmp_path, fake):
    with (
        pytest.raises(
            L0MoEError, match=r"vLLM ended while it ran .*broken \(last line: no such model\); see"
        ),
        VllmRunner(tmp_path / "broken", settings={}, python=fake, threads=1, log=tmp_path / "log"),
    ):
        pass


def test_without_the_environment(tmp_path):
    with pytest.raises(
        L0MoEError, match=r"environment \(.*none\) does not exist; make it with `make serve-setup`"
    ):
        VllmRunner(tmp_path, settings={}, python=tmp_path / "none", threads=1, log=tmp_path / "log")


def test_the_worker_is_pinned_and_sees_only_its_own_packages(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "x")
    environment = worker_environment(3)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert "PYTHONPATH" not in environment


def test_distinct_experts_are_counted_without_the_prefill(models):
    model = load_model(models[1])
    with DistinctExperts(model, ignore_passes=1) as experts, torch.no_grad():
        model(torch.arange(32)[None])
        model(torch.tensor([[1]]))
    assert experts.mean() == 2  # one token, top 2
    with DistinctExperts(model) as experts, torch.no_grad():
        model(torch.arange(32)[None])
    assert experts.mean() > 2


def test_the_command_makes_its_models_and_writes_a_table(tmp_path):
    out = tmp_path / "bench.json"
    words = (
        "bench --shape qwen2-7b --scale 0.02 --layers 2 --engine transformers --repeats 1 --prompt-tokens 8"
    )
    done = CliRunner().invoke(
        cli.app, [*words.split(), "--decode-tokens", "1", "--profile", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert "decode_b64" in done.stdout
    result = json.loads(out.read_text())
    assert result["source"] == {"shape": "qwen2-7b", "scale": 0.02, "layers": 2}
    shares = result["engines"]["transformers"]["profiles"]["prefill"]["l0moe"]["shares"]
    assert sum(shares.values()) == pytest.approx(1)
    assert "prefill, l0moe:" in Path(out.with_suffix(".md")).read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Give --dense and --moe, or --shape for random models."),
        (["--shape", "qwen2-7b", "--moe", "x"], "leave --dense and --moe out"),
        (["--shape", "qwen2-7b", "--dtype", "int8"], "--dtype 'int8' is not known"),
        (
            ["--shape", "qwen2-7b", "--engine", "sglang"],
            "--engine 'sglang' is not known; use transformers or vllm.",
        ),
    ],
    ids=["nothing", "both", "dtype", "engine"],
)
def test_refusals(words, message):
    done = CliRunner().invoke(cli.app, ["bench", *words])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr


def test_engines():
    assert parse_engine("vllm") == "vllm"

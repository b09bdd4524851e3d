"""The evaluate stage on tiny models; the export of the untrained checkpoint is replaced by a copy."""

import json
import shutil

import pytest

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.evaluation import evaluate as stage
from megatron_l0moe.recipe.recipe import Recipe


@pytest.fixture
def run(models, heldout, tmp_path):
    (tmp_path / "assemble" / "megatron").mkdir(parents=True)
    (tmp_path / "curate").mkdir()
    lines = heldout.read_text()
    (tmp_path / "curate" / "heldout.jsonl").write_text(lines * 4)
    shutil.copytree(models[1], tmp_path / "export")
    return tmp_path


@pytest.fixture
def recipe(models):
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"path": str(models[0]), "dense_layers": 1, "num_experts": 4, "expert_ffn": 8},
            "data": {
                "corpus": "corpus",
                "embedding_model": "encoder",
                "seq_length": 16,
                "tokens_per_expert": 1024,
                "tokens_per_set": 1024,
            },
            "evaluation": {"prefill_tokens": 8, "decode_tokens": 2, "repeats": 1},
        }
    )


def test_writes_every_result_and_removes_the_untrained_model(run, recipe, models, monkeypatch):
    calls = []

    def export(megatron, hf_base, out, *, dense_layers, top_k, target="transformers"):
        calls.append((megatron, hf_base, dense_layers, top_k))
        shutil.copytree(models[1], out)

    monkeypatch.setattr(stage, "export_moe", export)
    result = stage.evaluate(recipe, run, run / "evaluate")
    assert calls == [(run / "assemble" / "megatron", models[0], 1, 2)]
    assert sorted(path.name for path in (run / "evaluate").iterdir()) == [
        "perplexity.json",
        "router_load.json",
        "speed.json",
    ]
    tables = json.loads((run / "evaluate" / "perplexity.json").read_text())
    assert set(tables) == {"dense", "l0moe_untrained", "l0moe"}
    assert tables["l0moe_untrained"] == tables["l0moe"] != tables["dense"]
    assert result["perplexity"]["dense"] == tables["dense"]["overall"]
    load = json.loads((run / "evaluate" / "router_load.json").read_text())
    assert set(load) == {"1", "2"}
    assert set(load["1"]) == {"code", "novel"}
    assert len(load["1"]["code"]) == 4
    assert json.loads((run / "evaluate" / "speed.json").read_text())["prefill_ratio"] > 0


def test_untrained_model_is_removed_after_a_failure(run, recipe, monkeypatch):
    def export(megatron, hf_base, out, **shape):
        out.mkdir(parents=True)
        raise L0MoEError("no")

    monkeypatch.setattr(stage, "export_moe", export)
    with pytest.raises(L0MoEError, match="no"):
        stage.evaluate(recipe, run, run / "evaluate")
    assert not (run / "evaluate" / "untrained").exists()


@pytest.mark.parametrize("missing", ["assemble", "export"])
def test_missing_stage_is_named(run, recipe, missing):
    shutil.rmtree(run / missing)
    with pytest.raises(L0MoEError, match=f"run the {missing} stage first"):
        stage.evaluate(recipe, run, run / "evaluate")

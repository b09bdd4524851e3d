"""The reproduction's driver: its parts by hand, and the whole of it at a size at which its numbers mean nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from chain import toy_world as toy
from distributed import resume_world

ROOT = Path(__file__).parent.parent.parent
HERE = ROOT / "benchmarks" / "reproduction"
sys.path.append(str(HERE))

import corpus_step  # noqa: E402
import joined_index  # noqa: E402
import methods_step  # noqa: E402
import runs_table  # noqa: E402
import settings as reproduction_settings  # noqa: E402
import tables_step  # noqa: E402

from megatron_l0moe.data.curriculum import CurriculumDataset  # noqa: E402
from megatron_l0moe.errors import L0MoEError  # noqa: E402

SETTINGS, RUNS = HERE / "settings.yaml", HERE / "runs.yaml"


def place(root: Path) -> reproduction_settings.Place:
    return reproduction_settings.Place(root, reproduction_settings.load_settings(SETTINGS), root / "source")


def test_long_documents_are_cut_at_line_ends_and_nothing_is_lost() -> None:
    text = "ab\n" * 50 + "x" * 70 + "\nend"
    parts = list(corpus_step.cut(text, 32))
    assert "".join(parts) == text
    assert max(len(part) for part in parts) <= 32
    assert all(part.endswith("\n") for part in parts[:5])
    assert list(corpus_step.cut("short", 32)) == ["short"]


def test_no_document_lies_on_both_sides_of_the_split(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    texts = {d: [f"{d} {n} " + "word " * (n % 7 + 5) for n in range(60)] for d in ("a", "b")}
    lines = [{"text": t, "meta": {"source": d}} for d in texts for t in texts[d] + texts[d][:3]]
    (source / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    wanted = reproduction_settings.CorpusSettings(heldout_chars=300, document_chars=100)
    corpus_step.split_corpus(source, tmp_path / "out", wanted)
    from scanned import scan_corpus

    from megatron_l0moe.data.catalog import read_documents

    found: dict[str, list[str]] = {}
    for side in ("train", "heldout"):
        catalog = scan_corpus(tmp_path / "out" / side)
        found[side] = [document.text for _, document in read_documents(catalog, np.arange(len(catalog)))]
        assert catalog.domains == ["a", "b"]
    assert sorted(found["train"] + found["heldout"]) == sorted(
        texts["a"] + texts["b"]
    )  # repetitions are gone
    assert 600 <= sum(map(len, found["heldout"])) < 800
    too_much = wanted.model_copy(update={"heldout_chars": 100_000})
    with pytest.raises(L0MoEError, match="Domain 'a' has not enough documents"):
        corpus_step.split_corpus(source, tmp_path / "none", too_much)


def test_every_row_is_a_valid_recipe_of_the_same_tokens(tmp_path: Path) -> None:
    table, here = runs_table.load_table(RUNS), place(tmp_path)
    runs = {case.row: runs_table.chain_run(here, table, case) for case in table.cases()}
    tokens = {row: methods_step.tokens_of(run) for row, run in runs.items()}
    # 8 experts x 400 steps x 4 sequences, 4 sets x 100 steps x 32 sequences; 256 tokens each
    assert tokens["l0moe"] == (8 * 400 * 4 + 4 * 100 * 32) * 256
    trained = {row for row, run in runs.items() if run.recipe.expert_training.method == "l0"}
    assert {tokens[row] for row in trained} == {tokens["l0moe"]}
    # 131072 tokens of calibration for each expert
    assert {tokens[row] for row in runs.keys() - trained} == {8 * 131072 + 400 * 32 * 256}
    assert methods_step.mean_active_ffn(runs["dense-small"], here) == (2 * 768 + 4 * 2 * 96) // 6
    narrow = table.rows["l0moe"].model_copy(update={"recipe": {"model": {"expert_ffn": 97}}})
    uneven = runs_table.chain_run(here, table, runs_table.Case("uneven", 1, narrow))
    with pytest.raises(L0MoEError, match="do not spread evenly"):
        methods_step.mean_active_ffn(uneven, here)


def test_one_seed_of_every_row_comes_before_the_next_seed() -> None:
    table = runs_table.load_table(RUNS)
    names = [case.name for case in table.cases(["dense-further", "l0moe"])]
    assert names == [f"{row}-{seed}" for seed in (1, 2, 3) for row in ("dense-further", "l0moe")]
    with pytest.raises(L0MoEError, match="has no row 'nonsense'"):
        table.cases(["nonsense"])


def test_the_joined_stream_holds_every_sequence_of_the_run_once(tmp_path: Path) -> None:
    indexes = resume_world.write_indexes(tmp_path / "curate")
    for suffix in (".ccm.json", ".ccm.docs.npy", ".ccm.samples.npy"):
        for k in range(2):
            shutil.copyfile(indexes / f"expert{suffix}", indexes / f"expert_{k:03d}{suffix}")
    count = joined_index.join(tmp_path / "curate", 2, tmp_path / "dense" / "stream")
    joined = CurriculumDataset(tmp_path / "dense" / "stream", seq_length=resume_world.SEQUENCE)
    expert, moe = (CurriculumDataset(indexes / name) for name in ("expert_000", "moe"))
    expected = [expert[i // 2]["tokens"] for i in range(2 * len(expert))] + [
        item["tokens"] for item in moe_items(moe)
    ]
    assert count == len(joined) == len(expected)
    assert all(bool((joined[i]["tokens"] == tokens).all()) for i, tokens in enumerate(expected))


def moe_items(dataset: CurriculumDataset) -> list[dict[str, Any]]:
    return [dataset[i] for i in range(len(dataset))]


def result(row: str, seed: int | None, perplexities: dict[str, float]) -> tables_step.Result:
    values = {
        "perplexity": {"overall": sum(perplexities.values()) / 2, "per_domain": perplexities},
        "tokens": 2_000_000,
        "parameters": 4_000_000,
        "active_parameters": 3_000_000,
        "machine": {"cpu": "some processor"},
    }
    return tables_step.Result(row, seed, values, {"finished": "2026-01-01", "commit": "abc"})


def test_tables_by_hand() -> None:
    base = result("base", None, {"a": 10.0, "b": 20.0})
    rows = [result("m", 1, {"a": 11.0, "b": 10.0}), result("m", 2, {"a": 13.0, "b": 10.0})]
    lines = tables_step.markdown(base, rows, ["later"]).splitlines()
    # overall: 10.5 / 15 and 11.5 / 15
    assert "| m | 1, 2 | 2.00 M | 4.00 M | 3.00 M | 0.733 (0.047) |" in lines
    assert "| a | 10.00 | 1.200 (0.141) |" in lines
    assert "| b | 20.00 | 0.500 (0.000) |" in lines
    assert "Not run: later." in lines


TINY_SETTINGS: dict[str, Any] = {
    "corpus": {"heldout_chars": 4000, "document_chars": 500},
    "tokenizer": {"vocab_size": 300, "chars_per_domain": 4000},
    "model": {"layers": 2, "hidden": 32, "ffn": 48, "heads": 4, "kv_heads": 2},
    "data": {"seq_length": 32, "heldout_tokens_per_domain": 64},
    "base": {
        "steps": 4, "global_batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-3, "warmup_share": 0.25,
        "save_interval": 2, "flags": {"bf16": True},
    },
}  # fmt: skip
TINY_DENSE = {
    "global_batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-3, "warmup_share": 0.1, "save_interval": 10,
}  # fmt: skip


@pytest.mark.slow
def test_the_whole_of_it(tmp_path: Path) -> None:
    recipe = yaml.safe_load(toy.make_world(tmp_path / "world").read_text())
    recipe = {section: recipe[section] for section in recipe if section != "name"}
    corpus = recipe["data"].pop("corpus")
    del recipe["model"]["path"]
    recipe["data"]["heldout_tokens_per_domain"] = 32
    recipe["expert_training"]["at_once"] = 2
    recipe["model"]["expert_ffn"] = 12
    rows = {"l0moe": {}, "dense-further": {"kind": "dense-further"}, "dense-small": {"kind": "dense-small"}}
    table = {"seeds": [7], "recipe": recipe, "dense": TINY_DENSE, "rows": rows}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(TINY_SETTINGS))
    (tmp_path / "runs.yaml").write_text(yaml.safe_dump(table))
    words = [sys.executable, str(HERE / "run.py"), "--corpus", corpus, "--out", str(tmp_path / "out")]
    words += ["--settings", str(tmp_path / "settings.yaml"), "--runs", str(tmp_path / "runs.yaml")]
    words += ["--results", str(tmp_path / "results")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for again in (False, True):
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False, timeout=900)
        assert done.returncode == 0, done.stderr[-4000:]
        assert ("base ..." in done.stderr) != again  # the second time nothing is left to do
    found = json.loads((tmp_path / "results" / "reproduction.json").read_text())
    by_row = {one["row"]: one for one in found["results"]}
    assert set(by_row) == {"base", *rows}
    assert found["not_run"] == []
    assert by_row["l0moe"]["tokens"] == by_row["dense-further"]["tokens"] == 2 * 640 + 2 * 256
    losses = (tmp_path / "out" / "methods" / "dense-further-7" / "dense" / "metrics.jsonl").read_text()
    assert len(losses.splitlines()) == (2 * 640 + 2 * 256) // 32 // 4
    # (48 + 2 * 12) / 2 units in each layer: the same active FFN weights, but for the router's 2 x 32
    small, moe = (by_row[row]["active_parameters"] for row in ("dense-small", "l0moe"))
    assert moe - small == 2 * 32

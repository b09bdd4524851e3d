"""The reproduction's driver: its parts by hand, and the whole of it at a size at which its numbers mean nothing."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from distributed import resume_world
from whole_chain import toy_world as toy

ROOT = Path(__file__).parent.parent.parent
HERE = ROOT / "benchmarks" / "reproduction"
sys.path.append(str(HERE))

import base_step  # noqa: E402
import control_step  # noqa: E402
import corpus_step  # noqa: E402
import figures  # noqa: E402
import joined_index  # noqa: E402
import methods_step  # noqa: E402
import page  # noqa: E402
import results  # noqa: E402
import runs_table  # noqa: E402
import settings as reproduction_settings  # noqa: E402
import steps  # noqa: E402
import tables_step  # noqa: E402
import training_record  # noqa: E402

from megatron_l0moe.errors import L0MoEError  # noqa: E402
from megatron_l0moe.index.dataset import CurriculumDataset  # noqa: E402
from megatron_l0moe.modules.retention import LARGEST_BUDGET  # noqa: E402
from megatron_l0moe.reports import plots  # noqa: E402
from megatron_l0moe.runs import stage_folder  # noqa: E402

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

    from megatron_l0moe.curate.corpus.catalog import read_documents

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
    # 8 experts x 100 steps x 2 sequences, 4 sets x 25 steps x 16 sequences; 256 tokens each
    assert tokens["l0moe"] == (8 * 100 * 2 + 4 * 25 * 16) * 256
    trained = {row for row, run in runs.items() if run.recipe.expert_training.method == "l0"}
    assert {tokens[row] for row in trained} == {tokens["l0moe"]}
    # calibration takes all of a domain's 51200 tokens: as many as an expert run
    assert {tokens[row] for row in runs.keys() - trained} == {8 * 51_200 + 100 * 16 * 256}
    assert methods_step.mean_active_ffn(runs["dense-small"], here) == (2 * 512 + 4 * 2 * 64) // 6
    narrow = table.rows["l0moe"].model_copy(update={"recipe": {"model": {"expert_ffn": 65}}})
    uneven = runs_table.chain_run(here, table, runs_table.Case("uneven", 1, narrow))
    with pytest.raises(L0MoEError, match="do not spread evenly"):
        methods_step.mean_active_ffn(uneven, here)


def test_one_seed_of_every_row_comes_before_the_next_seed() -> None:
    table = runs_table.load_table(RUNS)
    names = [case.name for case in table.cases(["dense-further", "l0moe"])]
    assert names == [f"{row}-{seed}" for seed in (1, 2, 3) for row in ("l0moe", "dense-further")]
    assert [case.name for case in table.cases(["obs-2", "random"])] == ["random-1", "obs-2"]
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


def result(row: str, seed: int | None, perplexities: dict[str, float], **more: Any) -> results.Result:
    values = {
        "perplexity": {"overall": sum(perplexities.values()) / 2, "per_domain": perplexities},
        "tokens": 2_000_000,
        "parameters": 4_000_000,
        "active_parameters": 3_000_000,
        "machine": {"cpu": "some processor", "threads": 1},
    }
    words = ["/home/somebody/run.py", "--corpus", "/data/corpus", "--out=/data/out/", "base"]
    manifest = {"finished": "2026-01-01", "commit": "abc", "command": words}
    return results.Result(row, seed, values, manifest, **more)


def table_of(rows: dict[str, dict[str, Any]]) -> runs_table.RunsTable:
    return runs_table.RunsTable(
        seeds=[1, 2], recipe={}, dense=runs_table.DenseSettings(**TINY_DENSE), reference="m", drawn=[],
        rows={row: runs_table.Row(**settings) for row, settings in rows.items()},
    )  # fmt: skip


def phases(*flops: float) -> list[dict[str, Any]]:
    names = ("pretraining", "experts", "moe")
    return [{"name": name, "flops": count, "curve": {}} for name, count in zip(names, flops, strict=False)]


SPEED = {
    "details": {
        mode: {"ratio": {"median": 2.0, "q1": 1.5, "q3": 2.5}, "dense": {"tokens_per_second": 100.0}}
        for mode in ("prefill", "decode_b1", "decode_b8")
    },
    "settings": {"repeats": 3},
    "hardware": {"cpu": "some processor", "date": "2026-01-02"},
}


def test_tables_by_hand() -> None:
    base = result("base", None, {"a": 10.0, "b": 20.0}, training={"seed": 9, "phases": phases(3e15)})
    training = {
        "num_experts": 4,
        "iterations": 3,
        "phases": phases(3e15, 1e14, 2e14),
        "overlap": {"iou_mean": 0.5, "iou_chance": 0.25},
    }
    rows = [
        result("m", 1, {"a": 11.0, "b": 10.0}, training=training, speed=SPEED),
        result("m", 2, {"a": 13.0, "b": 10.0}, training=training),
        result("ablated", 1, {"a": 20.0, "b": 22.0}, training=training),
        result("k4", 1, {"a": 11.0, "b": 10.0}, training=training),
    ]
    # the busiest expert's share is 0.5 and 0.75 in domain a, 0.5 and 1 in domain b
    rows[0].values["router_load"] = {
        "1": {"a": [0.5, 0.5], "b": [0.5, 0.5]},
        "2": {"a": [0.75, 0.25], "b": [1.0, 0.0]},
    }
    table = table_of(
        {
            "m": {"table": "comparison"},
            "small": {"table": "comparison"},
            "ablated": {"table": "ablations"},
            "k4": {"table": "sweeps", "seeds": [1]},
        }
    )
    text = page.markdown("Results", base, rows, table, {"reproduction_x.png": "What x shows."})
    lines = text.splitlines()
    # overall: 10.5 / 15 and 11.5 / 15
    ratio, speeds = "0.733 (0.047)", "2.00 [1.50, 2.50]"
    assert (
        f"| m | 1, 2 | 2.00 M | 3.00e+15 | 3.00e+14 | 4.00 M | 3.00 M | {ratio} | {speeds} | {speeds} | {speeds} |"
        in lines
    )
    assert (
        "| base (perplexity 15.00) | 9 | 2.00 M | 3.00e+15 | - | 4.00 M | 3.00 M | 1 | 1 | 1 | 1 |" in lines
    )
    assert f"| m | 1, 2 | 2.00 M | 3.00e+14 | 3.00 M | {ratio} | 1.000 (0.000) |" in lines
    assert (
        "| ablated | 1 | 2.00 M | 3.00e+14 | 3.00 M | 1.400 | 2.000 |" in lines
    )  # to m of seed 1, not to m's mean
    assert "| k4 | 3 | 4 | 1 | 2.00 M | 4.00 M | 3.00 M | 0.700 | 1.000 | - | - | - |" in lines
    assert "| m | 1.200 (0.141) | 0.500 (0.000) |" in lines
    assert "| m | 0.500 (0.000) | 0.250 | 0.688 | 0.500 |" in lines
    assert "![reproduction_x](reproduction_x.png)" in lines
    assert "Not run: small, ablated (seed 2)." in lines
    assert "Not timed: small, k4." in lines
    assert "- commands: `run.py --corpus corpus --out= base`" in lines
    assert "/data" not in text
    assert "somebody" not in text


def test_a_table_names_its_rows() -> None:
    with pytest.raises(ValueError, match="no row 'm'"):
        table_of({"other": {"table": "sweeps"}})


def test_curves_and_flops_by_hand() -> None:
    rows = [{"tokens": 10 * (step + 1), "lm_loss": float(step)} for step in range(120)]
    phase = training_record.phase("experts", rows, 7.0, runs=4)
    assert (phase["tokens"], phase["flops"]) == (4 * 1200, 4 * 1200 * 7.0)
    assert len(phase["curve"]["flops"]) == training_record.CURVE_BINS == 60
    # two steps a point: losses 0 and 1 after 10 and 20 tokens of each of four runs
    assert (phase["curve"]["flops"][0], phase["curve"]["lm_loss"][0]) == (4 * 7.0 * 15.0, 0.5)
    short = training_record.phase("moe", rows[:3], 1.0)
    assert short["curve"] == {"flops": [10.0, 20.0, 30.0], "lm_loss": [0.0, 1.0, 2.0]}


def test_how_far_a_control_is_from_its_schedule() -> None:
    def row(target: float, retention: dict[str, float], loss: float, frozen: bool = False) -> dict[str, Any]:
        return {"retention_target": target, "retention": retention, "lm_loss": loss, "frozen": frozen}

    rows = [
        row(1.0, {"2": 1.0, "3": 1.0}, 9.0),
        row(0.5, {"2": 0.75, "3": 0.25}, 8.0),
        row(0.5, {"2": 0.5, "3": 0.5}, 3.0, frozen=True),
        row(0.5, {"2": 0.5, "3": 0.5}, 2.0, frozen=True),
    ]
    found = control_step.summary(rows)
    assert (found["mean_distance"], found["largest_distance"], found["frozen_loss"]) == (0.125, 0.25, 2.5)
    assert found["retention"] == [1.0, 0.5, 0.5, 0.5]
    controls = [{"control": "a", "seed": seed, **found} for seed in (1, 2)]
    controls[1]["frozen_loss"] = 3.5
    base = result("base", None, {"a": 10.0, "b": 20.0})
    text = page.markdown("T", base, [], table_of({"m": {"table": "comparison"}}), {}, controls)
    assert "| a | 4 | 1, 2 | 0.125 (0.000) | 0.250 (0.000) | 3.000 (0.707) |" in text.splitlines()
    (axes,) = figures.control_lines(controls).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [found["retention"], found["target"]]


def test_a_folder_is_made_by_one_process_at_a_time(tmp_path: Path) -> None:
    with steps.alone(tmp_path / "made") as mine:
        assert mine
        with steps.alone(tmp_path / "made", wait=False) as second:
            assert not second
        with steps.alone(tmp_path / "other", wait=False) as other:
            assert other
    with steps.alone(tmp_path / "made", wait=False) as free:
        assert free


def test_what_another_run_made_is_taken_over_only_if_it_is_the_same(tmp_path: Path) -> None:
    here = place(tmp_path)

    def stage(run: str, name: str, digest: str, *inputs: str) -> stage_folder.StageFolder:
        folder = tmp_path / "methods" / run
        return stage_folder.StageFolder(name, folder / name, digest, tuple(folder / one for one in inputs))

    def make(one: stage_folder.StageFolder, text: str) -> None:
        stage_folder.begin(one, "clear")
        (one.folder / "file").write_text(text)
        stage_folder.finish(one, ["command"], {"text": text})

    make(stage("a", "convert", "c"), "a's")
    make(stage("a", "experts", "e", "convert"), "a's experts")
    own = stage("b", "convert", "c")
    methods_step._link_twin(here, dataclasses.replace(own, config_hash="other"))
    assert not own.folder.exists()
    methods_step._link_twin(here, own)
    assert stage_folder.is_done(own)
    assert (own.folder / "file").read_text() == "a's"
    methods_step._link_twin(here, stage("b", "experts", "e", "convert"))
    assert stage_folder.is_done(stage("b", "experts", "e", "convert"))
    # the same settings, but c converted anew: a's experts were made from another file
    make(stage("c", "convert", "c"), "c's")
    methods_step._link_twin(here, stage("c", "experts", "e", "convert"))
    assert not (tmp_path / "methods" / "c" / "experts").exists()


def test_a_base_that_was_there(tmp_path: Path) -> None:
    here = dataclasses.replace(
        place(tmp_path),
        settings=reproduction_settings.load_settings(HERE / "smollm2_settings.yaml"),
    )
    model = tmp_path / "model"
    model.mkdir()
    with pytest.raises(L0MoEError, match=r"no config\.json"):
        base_step.link_base(model, tmp_path / "base")
    (model / "config.json").write_text("{}")
    base_step.link_base(model, here.base_model.parent)
    assert (here.base_model / "config.json").read_text() == "{}"
    assert here.tokens().inputs == (tmp_path / "corpus", tmp_path / "base")
    with pytest.raises(L0MoEError, match="no dense-small"):
        _ = here.own_base
    runs = runs_table.load_table(HERE / "smollm2_runs.yaml")
    tokens = {
        case.row: methods_step.tokens_of(runs_table.chain_run(here, runs, case)) for case in runs.cases()
    }
    assert set(tokens.values()) == {(4 * 72 + 48 * 4) * 512}

    after = phases(1.0, 2e14, 3e14)[1:]
    for one in after:
        one["curve"] = {"flops": [1e14, 2e14], "lm_loss": [3.0, 2.0]}
    base = result("base", None, {"a": 10.0, "b": 20.0}, training={"seed": None, "phases": []})
    base.values["tokens"] = 0
    moe = result("m", 1, {"a": 11.0, "b": 10.0}, training={"phases": after})
    text = page.markdown("T", base, [moe], table_of({"m": {"table": "comparison"}}))
    assert text.startswith("# T\n\nWritten by")
    assert "| base (perplexity 15.00) | - | - | - | - | 4.00 M | 3.00 M | 1 | 1 | 1 | 1 |" in text
    assert "| m | 1 | 2.00 M | - | 5.00e+14 | 4.00 M | 3.00 M | 0.700 | - | - | - |" in text
    (axes,) = figures.compute_curves(base, [moe]).axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[100.0, 200.0], [300.0, 400.0]]


TINY_SETTINGS: dict[str, Any] = {
    "page": "tiny",
    "title": "Tiny",
    "corpus": {"heldout_chars": 4000, "document_chars": 500},
    "data": {"seq_length": 32, "heldout_tokens_per_domain": 128},
    "base": {
        "tokenizer": {"vocab_size": 300, "chars_per_domain": 4000},
        "model": {"layers": 2, "hidden": 32, "ffn": 48, "heads": 4, "kv_heads": 2},
        "training": {
            "steps": 6, "global_batch_size": 4, "micro_batch_size": 2, "processes": 2, "learning_rate": 1e-3,
            "warmup_share": 0.25, "save_interval": 2, "flags": {"bf16": True},
        },
    },
    "speed": {"prefill_tokens": 16, "decode_tokens": 4, "repeats": 1},
}  # fmt: skip
TINY_DENSE = {
    "global_batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-3, "warmup_share": 0.1, "save_interval": 10,
}  # fmt: skip


def run_all(commands: list[list[str]], env: dict[str, str]) -> str:
    """Run commands at the same time; return the messages of all of them, without their times."""
    started = [subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True) for words in commands]
    texts = [process.communicate(timeout=1800)[1] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), texts
    return re.sub(r"^\S+ \S+ ", "", "\n" + "".join(texts), flags=re.M)


@pytest.mark.slow
def test_the_whole_of_it(tmp_path: Path) -> None:
    recipe = yaml.safe_load(toy.make_world(tmp_path / "world").read_text())
    recipe = {section: recipe[section] for section in recipe if section not in ("name", "dtype")}
    corpus = recipe["data"].pop("corpus")
    del recipe["model"]["path"]
    recipe["data"]["heldout_tokens_per_domain"] = 32
    recipe["expert_training"]["at_once"] = 2
    recipe["model"]["expert_ffn"] = 12
    rows = {
        "l0moe": {"table": "comparison"},
        "dense-further": {"table": "comparison", "kind": "dense-further"},
        "dense-small": {"table": "comparison", "kind": "dense-small"},
        "dsmoe": {"table": "comparison", "method": "dsmoe"},
        "mom": {"table": "comparison", "method": "mom", "recipe": {"mom": {"masks": 3, "target": 0.5}}},
    }
    table = {
        "seeds": [7],
        "recipe": recipe,
        "dense": TINY_DENSE,
        "rows": rows,
        "reference": "l0moe",
        "drawn": ["l0moe"],
        "control": {"steps": 10, "seeds": [1], "flags": {"budget": {"l0-retention-control": "budget"}}},
    }
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(TINY_SETTINGS))
    (tmp_path / "runs.yaml").write_text(yaml.safe_dump(table))
    words = [sys.executable, str(HERE / "run.py"), "--corpus", corpus, "--out", str(tmp_path / "out")]
    words += ["--settings", str(tmp_path / "settings.yaml"), "--runs", str(tmp_path / "runs.yaml")]
    words += ["--results", str(tmp_path / "results")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    first = run_all([[*words, "corpus", "tokenizer", "base"]], env)
    assert "base ..." in first
    both = run_all([[*words, "methods"]] * 2, env)  # two processes share the runs
    for row in rows:
        # a dense model is trained and then measured under the same name
        assert both.count(f"\n{row}-7 ...\n") == (2 if row.startswith("dense") else 1)
    assert len(re.findall(r": curate \.\.\.", both)) == 1  # all rows have the same data
    again = run_all([words], env)
    assert "speed of l0moe-7 ..." in again
    assert all(f"{row}-7: done" in again for row in rows)
    assert "base ..." not in again
    found = json.loads((tmp_path / "results" / "tiny.json").read_text())
    by_row = {one["row"]: one for one in found["results"]}
    assert set(by_row) == {"base", *rows}
    assert found["not_run"] == found["not_timed"] == []
    assert by_row["l0moe"]["tokens"] == by_row["dense-further"]["tokens"] == 2 * 640 + 2 * 256
    losses = (tmp_path / "out" / "methods" / "dense-further-7" / "dense" / "metrics.jsonl").read_text()
    assert len(losses.splitlines()) == (2 * 640 + 2 * 256) // 32 // 4
    # (48 + 2 * 12) / 2 units in each layer: the same active FFN weights, but for the router's 2 x 32
    small, moe = (by_row[row]["active_parameters"] for row in ("dense-small", "l0moe"))
    assert moe - small == 2 * 32
    assert set(by_row["l0moe"]["router"]["mean_load"]) == set(found["results"][0]["perplexity"]["per_domain"])
    assert [phase["name"] for phase in by_row["l0moe"]["phases"]] == ["pretraining", "experts", "moe"]
    assert by_row["dense-further"]["phases"][0] == by_row["base"]["phases"][0]
    assert sum(phase["tokens"] for phase in by_row["l0moe"]["phases"][1:]) == by_row["l0moe"]["tokens"]
    assert 1 <= by_row["dsmoe"]["open_blocks"] <= 8
    assert by_row["dsmoe"]["active_parameters"] < by_row["dsmoe"]["parameters"]
    for row in ("dsmoe", "mom"):
        assert by_row[row]["tokens"] == sum(phase["tokens"] for phase in by_row[row]["phases"][1:]) == 2 * 256
    assert by_row["l0moe"]["speed"].keys() == by_row["dense-small"]["speed"].keys() == plots.MODES.keys()
    assert [one["control"] for one in found["controls"]] == ["budget"]
    # the exact budget, which is capped where the schedule is 1
    assert found["controls"][0]["largest_distance"] == pytest.approx(1 - LARGEST_BUDGET, abs=1e-5)
    plotted = {"control", "compute", "heldout", "iou", "retention_l0moe", "router_l0moe"}
    assert {file.stem.removeprefix("tiny_") for file in (tmp_path / "results").glob("*.png")} == plotted
    # the tables need nothing but results/
    shutil.copytree(tmp_path / "out" / "results", tmp_path / "copy" / "results")
    tables_step.write_tables(
        dataclasses.replace(
            place(tmp_path / "copy"), settings=reproduction_settings.load_settings(tmp_path / "settings.yaml")
        ),
        runs_table.load_table(tmp_path / "runs.yaml"),
        tmp_path / "again",
    )
    for file in (tmp_path / "results").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()

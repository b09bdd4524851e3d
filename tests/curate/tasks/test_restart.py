"""What a second run of curate does with the files of the first: uses what is whole, makes the rest again."""

import json
import os
import runpy
import sys
from pathlib import Path

import curate_worlds as worlds
import pytest
import yaml

from megatron_l0moe.curate import curate as curate_module
from megatron_l0moe.curate import steps
from megatron_l0moe.curate.curate import curate
from megatron_l0moe.curate.tasks.step import UnitStep
from megatron_l0moe.errors import CorpusChangedError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def done_units(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the units that are done from now on."""
    done: list[str] = []
    do = UnitStep._do

    def counted(step: UnitStep, plan, unit: int) -> None:
        done.append(f"{step.name} {unit}")
        do(step, plan, unit)

    monkeypatch.setattr(UnitStep, "_do", counted)
    return done


def test_whole_units_are_not_done_again(expected, recipe_with, tmp_path: Path, done_units) -> None:
    curate(recipe_with(executor={"tasks": 2}), tmp_path / "expected")  # other tasks than before
    assert done_units == []
    assert worlds.checksums(tmp_path / "expected") == expected


def test_damaged_units_are_done_again_whatever_their_markers_say(
    expected, recipe_with, tmp_path: Path, done_units
) -> None:
    out = tmp_path / "expected"
    vectors = out / "work" / "embed" / "00002.npy"
    content = bytearray(vectors.read_bytes())
    content[-1] ^= 1
    vectors.write_bytes(content)
    (out / "work" / "scan" / "00001.json").unlink()
    shard = out / "iter_001" / "shard_00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    (out / "iter_002" / "shard_00000.idx").unlink()
    assert list((out / "work" / "embed" / "datatrove" / "completions").iterdir())
    curate(recipe_with(), out)
    assert worlds.checksums(out) == expected
    assert sorted(done_units)[:2] == ["embed 2", "scan 1"]
    assert len(done_units) == 4


def test_a_corpus_that_changes_while_it_is_read(
    recipe_with, small_units, tmp_path: Path, corpus: Path, monkeypatch
) -> None:
    """Even if size and time of the shard stay what they were."""
    shard = corpus / "part0.jsonl"
    hold_out = curate_module.hold_out

    def and_change(*args, **kwargs):
        result = hold_out(*args, **kwargs)
        before = shard.stat()
        shard.write_text(shard.read_text().replace("oven", "open"))
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(curate_module, "hold_out", and_change)
        with pytest.raises(
            CorpusChangedError, match=r"Shard part0\.jsonl of .* changed while it was read; start"
        ):
            curate(recipe_with(), tmp_path / "out")
    curate(recipe_with(), tmp_path / "out")
    curate(recipe_with(), tmp_path / "fresh")
    assert worlds.checksums(tmp_path / "out") == worlds.checksums(tmp_path / "fresh")


def test_what_a_kill_leaves_lies_in_the_work_folder(
    recipe_with, small_units, tmp_path: Path, monkeypatch
) -> None:
    """Partial files beside the finished ones would stay in the result for ever."""
    seen: list[Path] = []

    for kind in (steps.ScanStep, steps.EmbedStep, steps.TokeniseStep):

        def do_unit(step, plan, unit, files, original=kind.do_unit):
            seen.extend(files)
            return original(step, plan, unit, files)

        monkeypatch.setattr(kind, "do_unit", do_unit)
    curate(recipe_with(), tmp_path / "out")
    assert {file.suffix for file in seen} == {".npy", ".bin", ".idx"}
    assert all(tmp_path / "out" / "work" in file.parents and file.name.startswith(".") for file in seen)


def test_another_seed_or_corpus_clears_the_work(expected, recipe_with, tmp_path: Path, corpus: Path) -> None:
    out, recipe = tmp_path / "expected", recipe_with()
    curate(recipe.model_copy(update={"seed": 12}), out)
    curate(recipe.model_copy(update={"seed": 12}), tmp_path / "fresh")
    assert worlds.checksums(out) == worlds.checksums(tmp_path / "fresh") != expected
    with (corpus / "part4.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more document", "meta": {"source": "physics"}}) + "\n")
    curate(recipe, out)
    assert worlds.checksums(out) != expected


def test_the_tool(recipe_with, tmp_path: Path, corpus: Path, small_units, monkeypatch, capsys) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_with().model_dump(mode="json")))
    tool = runpy.run_path(str(ROOT / "tools" / "curate.py"))
    monkeypatch.setattr(sys, "argv", ["curate.py", str(recipe), "--out", str(tmp_path / "out")])
    assert tool["main"]() == 0
    assert (tmp_path / "out" / "summary.json").is_file()
    assert not (tmp_path / "out" / "work").exists()
    recipe.write_text(recipe.read_text().replace(str(corpus), str(corpus) + "-2"))
    assert tool["main"]() == 2
    assert "does not exist; set data.corpus" in capsys.readouterr().err

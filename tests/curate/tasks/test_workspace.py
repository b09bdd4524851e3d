"""What becomes of the work of an interrupted run: kept for the same settings and corpus, cleared for others."""

from pathlib import Path

import pytest

from megatron_l0moe.curate.tasks.units import Workspace
from megatron_l0moe.errors import CorpusChangedError, L0MoEError


def fill(out: Path) -> None:
    for name in (
        "work/embed/00000.npy",
        "iter_000/shard_00000.bin",
        "moe.ccm.json",
        "summary.json",
        "notes.txt",
    ):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("x")


def left(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


def test_the_same_settings_keep_the_work(tmp_path: Path) -> None:
    first = Workspace.begin(tmp_path, {"seed": 1})
    fill(tmp_path)
    before = left(tmp_path)
    assert Workspace.begin(tmp_path, {"seed": 1}) == first
    assert left(tmp_path) == before


def test_what_a_killed_driver_was_writing_is_removed(tmp_path: Path) -> None:
    Workspace.begin(tmp_path, {"seed": 1})
    fill(tmp_path)
    before = left(tmp_path)
    for name in (".moe.ccm.json.k2x9", ".heldout.jsonl.q0", ".summary.json._a", ".clusters.npz"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".other").write_text("not ours")
    Workspace.begin(tmp_path, {"seed": 1})
    assert left(tmp_path) == before | {".other"}


def test_other_settings_clear_what_the_stage_made_and_nothing_else(tmp_path: Path) -> None:
    old = Workspace.begin(tmp_path, {"seed": 1})
    fill(tmp_path)
    new = Workspace.begin(tmp_path, {"seed": 2})
    assert left(tmp_path) == {"notes.txt", "work/identity"}
    new.check_current()
    with pytest.raises(L0MoEError, match="was begun anew by another command"):
        old.check_current()


def test_files_of_an_older_version_are_cleared(tmp_path: Path) -> None:
    fill(tmp_path)
    Workspace.begin(tmp_path, {})
    assert left(tmp_path) == {"notes.txt", "work/identity"}


def test_a_corpus_that_changed_is_begun_anew(tmp_path: Path) -> None:
    workspace = Workspace.begin(tmp_path, {"seed": 1})
    fill(tmp_path)
    workspace.refuse_later(CorpusChangedError("Shard a changed."))
    Workspace.begin(tmp_path, {"seed": 1})
    assert left(tmp_path) == {"notes.txt", "work/identity"}

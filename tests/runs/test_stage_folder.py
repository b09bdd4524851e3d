"""Markers, manifests, and what is refused or cleared."""

import hashlib
import json
from pathlib import Path

import pytest

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs import stage_folder
from megatron_l0moe.runs.stage_folder import (
    WORK,
    StageFolder,
    begin,
    clear,
    drop_work,
    finish,
    is_done,
    read_manifest,
    sha256_file,
    write_json,
)
from megatron_l0moe.runtime.json_files import read_json


@pytest.fixture
def stage(tmp_path: Path) -> StageFolder:
    return StageFolder(name="curate", folder=tmp_path / "run" / "curate", config_hash="aaaa")


def made(stage: StageFolder) -> StageFolder:
    begin(stage, "clear")
    (stage.folder / "out.bin").write_bytes(b"12345")
    finish(stage, ["l0moe", "curate"], {"tokens": 5})
    return stage


def test_finish_makes_it_done(stage: StageFolder) -> None:
    assert not is_done(stage)
    made(stage)
    assert is_done(stage)
    record = json.loads((stage.folder / "manifest.json").read_text())
    assert record["outputs"] == {"out.bin": 5}
    assert record["numbers"] == {"tokens": 5}
    assert record["command"] == ["l0moe", "curate"]
    assert record["versions"]["python"].startswith("3.")


def test_manifest_without_marker_is_not_done(stage: StageFolder) -> None:
    made(stage)
    (stage.folder / "DONE").unlink()
    assert not is_done(stage)


def test_other_settings_are_refused(stage: StageFolder) -> None:
    made(stage)
    other = StageFolder(name="curate", folder=stage.folder, config_hash="bbbb")
    with pytest.raises(
        L0MoEError, match=r"other settings \(aaaa\).*\(bbbb\); give the recipe another name, or remove"
    ):
        is_done(other)


def test_inputs_made_anew_are_noticed(stage: StageFolder, tmp_path: Path) -> None:
    made(stage)
    after = StageFolder(
        name="moe", folder=tmp_path / "run" / "moe", config_hash="cccc", inputs=(stage.folder,)
    )
    finish(after, [], {})
    assert is_done(after)
    finish(stage, [], {"tokens": 6})
    with pytest.raises(L0MoEError, match="was made from an earlier curate than the one there now"):
        is_done(after)


def test_unfinished_input_is_named(stage: StageFolder, tmp_path: Path) -> None:
    after = StageFolder(
        name="moe", folder=tmp_path / "run" / "moe", config_hash="cccc", inputs=(stage.folder,)
    )
    with pytest.raises(L0MoEError, match=r"The stage moe needs .*curate, which is not finished"):
        finish(after, [], {})


def test_half_written_folder_is_cleared(stage: StageFolder, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "keep").touch()
    (stage.folder / "sub").mkdir(parents=True)
    (stage.folder / "sub" / "half").touch()
    (stage.folder / "link").symlink_to(elsewhere)
    begin(stage, "clear")
    assert list(stage.folder.iterdir()) == []
    assert (elsewhere / "keep").exists()


def test_finished_folder_is_never_cleared(stage: StageFolder) -> None:
    made(stage)
    with pytest.raises(AssertionError):
        clear(stage)
    assert (stage.folder / "out.bin").exists()


def test_work_of_a_stage_is_kept_until_it_is_done_and_never_listed(stage: StageFolder) -> None:
    begin(stage, "own")
    (stage.folder / WORK / "scan").mkdir(parents=True)
    (stage.folder / WORK / "scan" / "00000.npy").touch()
    (stage.folder / "workers.txt").touch()
    begin(stage, "own")
    finish(stage, [], {})
    assert read_manifest(stage.folder)["outputs"] == {"workers.txt": 0}
    assert (stage.folder / WORK / "scan" / "00000.npy").exists()
    drop_work(stage)
    assert not (stage.folder / WORK).exists()
    drop_work(stage)


def test_resumable_folder_is_kept(stage: StageFolder) -> None:
    begin(stage, "resume")
    (stage.folder / "checkpoints").mkdir()
    begin(stage, "resume")
    assert (stage.folder / "checkpoints").is_dir()


def test_resumable_folder_of_other_settings_is_refused(stage: StageFolder) -> None:
    begin(stage, "resume")
    (stage.folder / "checkpoints").mkdir()
    with pytest.raises(L0MoEError, match="holds unfinished work that was started with other settings"):
        begin(StageFolder(name="curate", folder=stage.folder, config_hash="bbbb"), "resume")
    assert (stage.folder / "checkpoints").is_dir()


def test_resumable_folder_without_its_note_is_refused_and_kept(stage: StageFolder) -> None:
    (stage.folder / "checkpoints").mkdir(parents=True)
    with pytest.raises(L0MoEError, match="did not start, such as a training run by hand"):
        begin(stage, "resume")
    assert (stage.folder / "checkpoints").exists()


def test_sha256_by_hand(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_file(tmp_path / "f").startswith("ba7816bf8f01cfea")  # FIPS 180-2, appendix B.1
    assert sha256_file(tmp_path / "f") == hashlib.sha256(b"abc").hexdigest()


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def no_rename(source: str, target: Path) -> None:
        raise OSError("no")

    monkeypatch.setattr(stage_folder.os, "replace", no_rename)
    with pytest.raises(OSError, match="no"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_not_a_number_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", float("nan"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff{}", "is not valid JSON"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": 1e999}', "1e999 is too large"),
        (b"[1]", "must hold a JSON object"),
        (b'{"a": ' + b"[" * 100_000, "is not valid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not valid JSON"),
    ],
)
def test_json_that_is_none(tmp_path: Path, text: bytes, reason: str) -> None:
    file = tmp_path / "x.json"
    with pytest.raises(L0MoEError, match=r"x\.json is missing; look again\.$"):
        read_json(file, "look again")
    file.write_bytes(text)
    with pytest.raises(L0MoEError, match=rf"x\.json .*{reason}.*; look again\.$") as refused:
        read_json(file, "look again")
    assert "\n" not in str(refused.value)
    file.write_bytes(b'{"a": 1.5e3}')
    assert read_json(file, "look again") == {"a": 1500.0}


def test_a_manifest_is_part_of_its_own_checksum(stage: StageFolder) -> None:
    made(stage)
    file = stage.folder / "manifest.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps({**written, "numbers": {"tokens": 6}}))
    with pytest.raises(L0MoEError, match=r"manifest\.json was changed after it was written"):
        is_done(stage)
    file.write_text(json.dumps(written, sort_keys=True))  # control: the same values
    assert is_done(stage)
    assert "checksum" not in read_manifest(stage.folder)


def test_outputs_beside_the_folder(tmp_path: Path) -> None:
    summary = tmp_path / "run" / "summary.json"
    stage = StageFolder(
        name="report", folder=tmp_path / "run" / "report", config_hash="aaaa", beside=(summary,)
    )
    made(stage)
    assert set(read_manifest(stage.folder)["outputs"]) == {"out.bin"}
    summary.write_text("{}")
    finish(stage, [], {})
    assert read_manifest(stage.folder)["outputs"] == {"out.bin": 5, "../summary.json": 2}

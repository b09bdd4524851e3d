"""Files against what was recorded of them: every way to differ, and the order in which it is said."""

import json
from pathlib import Path

import pytest

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs.stage_folder import (
    StageFolder,
    begin,
    finish,
    read_manifest,
    recorded_model,
    recorded_outputs,
)


@pytest.fixture
def stage(tmp_path: Path) -> StageFolder:
    stage = StageFolder(name="curate", folder=tmp_path / "run" / "curate", config_hash="aaaa")
    begin(stage, "clear")
    for name in ("one", "two", "verdict", "big"):
        (stage.folder / name).write_text(name)
    finish(stage, [], {}, unread=lambda name: name == "big")
    return stage


def problems(stage: StageFolder) -> dict[str, str]:
    return dict(recorded_outputs(stage.folder).problems())


def test_each_way_to_differ(stage: StageFolder) -> None:
    assert problems(stage) == {}
    manifest = read_manifest(stage.folder)
    assert manifest["outputs"] == {"big": 3, "one": 3, "two": 3}
    assert set(manifest["sha256"]) == {"one", "two"}
    (stage.folder / "two").unlink()
    (stage.folder / "one").write_text("eno")
    (stage.folder / "big").write_text("gib")  # of the right size, and no sha256 is known of it
    (stage.folder / "verdict").write_text("done")
    assert list(recorded_outputs(stage.folder).problems()) == [
        ("two", "is missing"),
        ("one", "is not the file that was written (its sha256 differs)"),
    ]
    (stage.folder / "big").write_text("b")
    assert problems(stage)["big"] == "has 1 bytes instead of 3"


def test_an_older_manifest_is_compared_by_size(stage: StageFolder) -> None:
    file = stage.folder / "manifest.json"
    older = {
        key: value for key, value in json.loads(file.read_text()).items() if key not in ("sha256", "checksum")
    }
    file.write_text(json.dumps(older))
    (stage.folder / "one").write_text("eno")
    assert problems(stage) == {}
    (stage.folder / "one").write_text("o")
    assert problems(stage) == {"one": "has 1 bytes instead of 3"}


@pytest.mark.parametrize(
    "change",
    [
        {"outputs": 5},
        {"outputs": {"one": "3"}},
        {"sha256": {"one": 5}},
        {"sha256": {"other": "ff"}},
        {"sha256": []},
    ],
)
def test_a_manifest_that_lists_no_files(stage: StageFolder, change: dict[str, object]) -> None:
    file = stage.folder / "manifest.json"
    values = json.loads(file.read_text()) | change
    file.write_text(json.dumps(values))
    with pytest.raises(L0MoEError, match="was changed after it was written"):
        recorded_outputs(stage.folder)
    del values["checksum"]
    file.write_text(json.dumps(values))
    with pytest.raises(L0MoEError, match="does not list files by size and sha256"):
        recorded_outputs(stage.folder)


def test_the_dense_model(stage: StageFolder, tmp_path: Path) -> None:
    assert recorded_model(stage.folder) is None
    (tmp_path / "config.json").write_text("{}")
    model: dict[str, object] = {
        "path": str(tmp_path),
        "sizes": {"config.json": 2},
        "sha256": {"config.json": "ff"},
    }
    finish(stage, [], {}, model=model)
    found = recorded_model(stage.folder)
    assert found is not None
    assert dict(found.problems()) == {"config.json": "is not the file that was written (its sha256 differs)"}
    finish(stage, [], {}, model={"path": 5})
    with pytest.raises(L0MoEError, match="does not list files"):
        recorded_model(stage.folder)

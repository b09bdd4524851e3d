"""The chain with stand-in stages in real processes: what is done, skipped, cleared, resumed, refused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import PATIENCE, alive, wait_until
from toy_recipe import make_run, write_model

import megatron_l0moe
from megatron_l0moe.chain import run_local
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.recipe import load_recipe
from megatron_l0moe.runs.stages import Run

PACKAGE_ROOT = Path(megatron_l0moe.__file__).parent.parent
FAKE = Path(__file__).parent / "fake_stage.py"
BEFORE_EVALUATION = ["convert", "curate", "experts", "assemble", "moe", "export"]


def fake_command(run: Run, name: str) -> list[str]:
    return [sys.executable, str(FAKE), name, str(run.recipe_file), "--runs-dir", str(run.runs_dir)]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(run_local, "stage_command", fake_command)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join((str(PACKAGE_ROOT), str(FAKE.parent), str(FAKE.parent.parent)))
    )
    return new_run(tmp_path)


def new_run(tmp_path: Path, **changes: Any) -> Run:
    (tmp_path / "corpus").mkdir(exist_ok=True)
    (tmp_path / "runs").mkdir(exist_ok=True)
    model = write_model(tmp_path / "model")
    return make_run(tmp_path, model__path=str(model), data__corpus=str(tmp_path / "corpus"), **changes)


def calls(run: Run) -> list[str]:
    path = run.runs_dir / "calls"
    names = path.read_text().split() if path.is_file() else []
    path.unlink(missing_ok=True)
    return names


def test_all_stages_then_none(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run_local.run_chain(run, last="export")
    assert calls(run) == BEFORE_EVALUATION
    manifest = json.loads((run.stage_folder("moe") / "manifest.json").read_text())
    assert set(manifest["inputs"]) == {"curate", "assemble"}
    assert manifest["numbers"]["process"]["peak_process_bytes"] > 1_000_000
    assert manifest["command"][-4:] == ["moe", str(run.recipe_file), "--runs-dir", str(run.runs_dir)]
    capsys.readouterr()
    run_local.run_chain(run, last="export")
    assert calls(run) == []
    assert "stage 3 of 6  experts    done before" in capsys.readouterr().out


def test_only_what_a_change_touches_is_refused(run: Run, tmp_path: Path) -> None:
    run_local.run_chain(run, last="moe")
    calls(run)
    changed = new_run(tmp_path, moe_training__learning_rate=0.5)
    with pytest.raises(L0MoEError, match=r"runs/toy/moe was made with other settings"):
        run_local.run_chain(changed, last="moe")
    assert calls(run) == []
    other_evaluation = new_run(tmp_path, evaluation__repeats=9)
    run_local.run_chain(other_evaluation, last="moe")
    assert calls(run) == []


def test_foreign_marker_is_refused_before_any_work(run: Run) -> None:
    run.stage_folder("export").mkdir(parents=True)
    (run.stage_folder("export") / "DONE").write_text("0123456789abcdef\n")
    with pytest.raises(L0MoEError, match=r"export was made with other settings \(0123456789abcdef\)"):
        run_local.run_chain(run)
    assert calls(run) == []


def test_failure_then_going_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL", "curate")
    message = (
        r"Stage curate failed\. .* exit code 1: RuntimeError: the disk is on fire; its log is .*curate\.log"
    )
    with pytest.raises(L0MoEError, match=message):
        run_local.run_chain(run, last="curate")
    assert (run.stage_folder("curate") / "half").exists()
    assert not (run.stage_folder("curate") / "DONE").exists()
    monkeypatch.delenv("FAKE_FAIL")
    (run.stage_folder("curate") / "left over").touch()
    calls(run)
    run_local.run_chain(run, last="curate")
    assert calls(run) == ["curate"]
    assert not (run.stage_folder("curate") / "left over").exists()


def test_refusal_of_a_stage_is_passed_on_as_it_is(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_REFUSE", "curate")
    with pytest.raises(L0MoEError) as caught:
        run_local.run_chain(run, last="curate")
    assert str(caught.value) == "The corpus is empty; add shards."


def test_later_start_needs_the_stages_before(run: Run) -> None:
    with pytest.raises(L0MoEError, match=r"The stage assemble needs .*convert, which is not finished"):
        run_local.run_chain(run, first="assemble", last="assemble")


def test_training_folders_are_resumed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run_local.run_chain(run, last="assemble")
    monkeypatch.setenv("FAKE_FAIL", "moe")
    with pytest.raises(L0MoEError, match="on fire"):
        run_local.run_chain(run, last="moe")
    (run.stage_folder("moe") / "checkpoints").mkdir()
    monkeypatch.delenv("FAKE_FAIL")
    run_local.run_chain(run, last="moe")
    assert (run.stage_folder("moe") / "checkpoints").is_dir()


def test_training_folder_of_other_settings_is_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_local.run_chain(run, last="assemble")
    monkeypatch.setenv("FAKE_FAIL", "moe")
    with pytest.raises(L0MoEError, match="on fire"):
        run_local.run_chain(run, last="moe")
    monkeypatch.delenv("FAKE_FAIL")
    with pytest.raises(L0MoEError, match=r"moe holds unfinished work that was started with other settings"):
        run_local.run_chain(new_run(tmp_path, moe_training__learning_rate=0.5), last="moe")


def test_one_expert(run: Run) -> None:
    run_local.run_chain(run, last="curate")
    run_local.carry_out(run, "experts", lambda stage: {"k": stage.folder.name}, only=2)
    assert [path.name for path in sorted(run.stage_folder("experts").iterdir())] == ["002"]
    with pytest.raises(L0MoEError, match=r"--index 4 must be between 0 and 3"):
        run_local.carry_out(run, "experts", lambda stage: {}, only=4)


def at_once(run: Run, tmp_path: Path, number: int) -> Run:
    return new_run(tmp_path, expert_training__at_once=number)


def test_experts_side_by_side(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_local.run_chain(run, last="curate")
    monkeypatch.setenv("FAKE_MEET", "experts")  # each waits until a second one is there
    run_local.carry_out(at_once(run, tmp_path, 2), "experts", lambda stage: {})
    assert calls(run) == ["convert", "curate", *["experts"] * 4]
    for k in range(4):
        assert (run.expert_folder(k) / "DONE").is_file()
        assert f"--index {k}" in run.log_file(f"expert_{k:03d}").read_text()
    run_local.carry_out(at_once(run, tmp_path, 2), "experts", lambda stage: {})
    assert calls(run) == []


def test_failure_of_one_expert_names_its_log(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_local.run_chain(run, last="curate")
    monkeypatch.setenv("FAKE_FAIL", "experts")
    with pytest.raises(
        L0MoEError, match=r"Stage experts failed\. .*the disk is on fire; its log is .*expert_00"
    ):
        run_local.carry_out(at_once(run, tmp_path, 3), "experts", lambda stage: {})
    monkeypatch.delenv("FAKE_FAIL")
    monkeypatch.setenv("FAKE_REFUSE", "experts")
    with pytest.raises(L0MoEError, match=r"^The corpus is empty; add shards\.$"):
        run_local.carry_out(at_once(run, tmp_path, 3), "experts", lambda stage: {})


def test_several_nodes_are_not_started_here(run: Run) -> None:
    training = run.recipe.moe_training.model_copy(
        update={"parallel": run.recipe.moe_training.parallel.model_copy(update={"nodes": 2, "processes": 2})}
    )
    recipe = run.recipe.model_copy(update={"moe_training": training})
    with pytest.raises(
        L0MoEError, match=r"moe_training\.parallel\.nodes is 2, and this command runs on one machine"
    ):
        run_local.run_chain(dataclasses.replace(run, recipe=recipe))


CHAIN = """
import sys
from pathlib import Path
from test_run_local import fake_command
from megatron_l0moe.chain import run_local
from megatron_l0moe.runs.stages import Run
from megatron_l0moe.recipe.recipe import load_recipe
file = Path(sys.argv[1])
run_local.stage_command = fake_command
run_local.run_chain(Run(recipe=load_recipe(file), recipe_file=file, runs_dir=Path(sys.argv[2])), last="moe")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_killed_in_the_middle_then_going_on(run: Run, number: int) -> None:
    environment = {**os.environ, "FAKE_HANG": "experts"}
    command = [sys.executable, "-c", CHAIN, str(run.recipe_file), str(run.runs_dir)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    hanging = run.folder / "hanging"
    wait_until(lambda: process.poll() is not None or (hanging.is_file() and hanging.read_text() != ""))
    assert process.poll() is None
    process.send_signal(number)
    process.wait(PATIENCE)
    calls(run)
    run_local.run_chain(run, last="moe")  # waits for the children of the killed command
    assert calls(run) == ["experts", "assemble", "moe"]
    # A process's locks go a moment before the process itself does.
    wait_until(lambda: not alive(int(hanging.read_text())))


def test_extraction_is_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert not run_local.is_extracted(tmp_path)
    assert run_local.extract_once(tmp_path, lambda: {"width": 16}) == {"width": 16}
    assert run_local.is_extracted(tmp_path)
    assert not (tmp_path / "checkpoints").exists()

    def fail() -> dict[str, object]:
        raise AssertionError

    assert run_local.extract_once(tmp_path, fail) == {"width": 16}


def test_fake_recipe_is_read_back(run: Run) -> None:
    assert load_recipe(run.recipe_file) == run.recipe

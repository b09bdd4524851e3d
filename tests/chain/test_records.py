"""What a training job was started from, as it lies in the run folder before the first step."""

import json
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy_recipe import make_run, toy_architecture

from megatron_l0moe.chain import batch_phases, preflight, records, run_local, training_commands
from megatron_l0moe.chain.slurm.sbatch import SETUP_BEGINS, SETUP_ENDS
from megatron_l0moe.recipe.recipe import load_recipe
from megatron_l0moe.runs import stage_folder
from megatron_l0moe.runs.child_process import CommandFailedError
from megatron_l0moe.runs.stage_folder import StageFolder
from megatron_l0moe.runs.stages import Run, stages

HIDDEN = "hunter2hunter2"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path)


def written(run: Run, stage: str = "moe", *, attempt: int = 1) -> Path:
    folder = run.expert_folder(2) if stage == "experts" else run.stage_folder(stage)
    return records.write_records(run, folder, ["python", "-m", "a module"], attempt=attempt)


def test_every_record_is_there(run: Run) -> None:
    folder = written(run)
    assert folder == run.stage_folder("moe") / "records" / "attempt_001"
    assert {path.name for path in folder.iterdir()} - {"diff.patch"} == {
        *("recipe.yaml", "config_hash", "commit", "packages.txt", "command.txt", "environment.json")
    }
    assert load_recipe(folder / "recipe.yaml") == run.recipe
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["seed"] == 1234  # a default, filled in
    assert (folder / "config_hash").read_text().strip() == stages(run, "moe")[0].config_hash
    assert f"numpy=={version('numpy')}\n" in (folder / "packages.txt").read_text()
    assert shlex.split((folder / "command.txt").read_text()) == ["python", "-m", "a module"]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["host"]
    assert environment["working_folder"] == str(Path.cwd())


def test_an_experts_folder_has_the_hash_of_its_stage(run: Run) -> None:
    digest = (written(run, "experts") / "config_hash").read_text().strip()
    assert digest == stages(run, "experts")[2].config_hash
    assert digest != stages(run, "moe")[0].config_hash


def test_attempts_are_counted(run: Run) -> None:
    assert records.next_attempt(run.stage_folder("moe")) == 1
    written(run, attempt=1)
    written(run, attempt=7)
    (run.stage_folder("moe") / "records" / "attempt_old").mkdir()
    assert records.next_attempt(run.stage_folder("moe")) == 8


def test_no_secret_is_recorded(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "moe.sbatch"
    script.write_text(
        f"#!/bin/bash\n#SBATCH --export=ALL,HF_TOKEN={HIDDEN}\n"
        f"export WANDB_API_KEY='{HIDDEN}' NCCL_DEBUG=INFO\nexport MY_PASSWORD={HIDDEN}\n"
        f"{SETUP_BEGINS}\nmodule load cuda\nexport lower_case=a,{HIDDEN}\nwandb login {HIDDEN}\n{SETUP_ENDS}\n"
        f"export BOTH='a b {HIDDEN}',{HIDDEN} OMP_NUM_THREADS=2\nHUSH={HIDDEN} env OTHER=\"{HIDDEN}\" true\n"
        "export L0MOE_LOG_DIR=logs/\"$stage/${job}\"\nstage='moe'\n"
    )
    hidden = {
        "WANDB_API_KEY": HIDDEN,  # no known prefix
        "HOME_OF": HIDDEN,
        "SLURM_JWT": HIDDEN,
        "NVIDIA_API_KEY": HIDDEN,
        "L0MOE_TOKEN": HIDDEN,
        "SLURM_EXPORT_ENV": f"ALL,WANDB_API_KEY={HIDDEN}",
        "NVIDIA_MIRROR": f"https://me:{HIDDEN}@example.org/x",
        # no name and no value that a pattern would know
        "L0MOE_PW": HIDDEN,
        "NCCL_AUTH": HIDDEN,
        "SLURM_PWD": HIDDEN,
        "TORCH_HOOK": f"https://example.org/services/T0/{HIDDEN}",
    }
    shown = {"SLURM_JOB_ID": "42", "NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "0,1"}
    for name, value in {**hidden, **shown, "L0MOE_SBATCH_FILE": str(script)}.items():
        monkeypatch.setenv(name, value)
    folder = written(run)
    for path in folder.iterdir():
        assert HIDDEN not in path.read_text(errors="replace"), path
    environment = json.loads((folder / "environment.json").read_text())
    assert shown.items() <= environment["variables"].items()
    assert {name for name in hidden if name.startswith(records.FAMILIES)} <= set(environment["left_out"])
    assert "NCCL_DEBUG" not in environment["left_out"]
    batch = (folder / "job.sbatch").read_text()
    assert "export WANDB_API_KEY=*** NCCL_DEBUG=INFO\n" in batch
    assert f"{SETUP_BEGINS}\nmodule load cuda\nexport lower_case=***\n# not recorded: a line of " in batch
    assert "export BOTH=*** OMP_NUM_THREADS=2\nHUSH=*** env OTHER=*** true\n" in batch
    assert "export L0MOE_LOG_DIR=logs/\"$stage/${job}\"\nstage='moe'\n" in batch


def test_missing_batch_script_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("L0MOE_SBATCH_FILE", "/nowhere/job.sbatch")
    assert "/nowhere/job.sbatch could not be read" in (written(run) / "job.sbatch").read_text()


def modified(monkeypatch: pytest.MonkeyPatch, changes: bytes, untracked: list[str]) -> None:
    monkeypatch.setattr(stage_folder, "commit", lambda: "0" * 40 + "+changes")
    monkeypatch.setattr(stage_folder, "changes", lambda: changes)
    monkeypatch.setattr(stage_folder, "untracked", lambda: untracked)


def test_modified_tree(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    modified(monkeypatch, b"diff --git a/x b/x\n+\xff\n", ["new.py"])
    folder = written(run)
    assert (folder / "commit").read_text() == "0" * 40 + "+changes\n"
    assert (folder / "diff.patch").read_bytes() == (
        b"# not in git, and not in this file: new.py\ndiff --git a/x b/x\n+\xff\n"
    )


def test_long_changes_are_cut_with_a_note(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    line = b"+" + b"x" * 98 + b"\n"
    modified(monkeypatch, line * 20_000, [])
    note, *lines = (written(run) / "diff.patch").read_bytes().splitlines(keepends=True)
    assert note == b"# cut: 2000000 bytes of changes, of which the first 1048576 are kept\n"
    assert lines == [line] * (records.DIFF_LIMIT // 100)


def test_wheel_without_git(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    modified(monkeypatch, b"diff --git a/x b/x\n", [])
    assert (written(run) / "diff.patch").exists()
    modified(monkeypatch, b"", [])
    monkeypatch.setattr(stage_folder, "commit", lambda: None)
    folder = written(run)  # the same attempt again: no difference of the call before may stay
    assert "installed without its source tree" in (folder / "commit").read_text()
    assert not (folder / "diff.patch").exists()


def test_training_writes_them_before_it_starts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []

    def job_that_fails(command: list[str], *, env: dict[str, str], **settings: Any) -> None:
        seen.extend(sorted((run.stage_folder("moe") / "records").iterdir()))
        text = (seen[-1] / "command.txt").read_text()
        assert shlex.split(text) == ["env", *(f"{name}={value}" for name, value in env.items()), *command]
        raise CommandFailedError("it failed", code=1, last_line="", log=Path("train.log"))

    monkeypatch.setattr(run_local, "run_command", job_that_fails)
    monkeypatch.setattr(run_local, "_architecture", lambda run: toy_architecture())
    monkeypatch.setattr(preflight, "check_machine", lambda *words: None)
    stage: StageFolder = stages(run, "moe")[0]
    for attempt in (1, 2):
        with pytest.raises(CommandFailedError):
            run_local.train_moe(run, stage)
        assert seen[-1].name == f"attempt_{attempt:03d}"


def test_a_batch_job_writes_them_while_it_prepares(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    job = training_commands.moe_job(run, toy_architecture())
    monkeypatch.setattr(batch_phases.TrainingJob, "job", job)
    for name in ("convert", "curate", "experts", "assemble"):
        run_local.carry_out(run, name, lambda stage: {})
    folder = run.stage_folder("moe")
    for attempt in (1, 2):
        assert batch_phases.run_phase(run, "moe", "prepare", lambda stage: {}) == 0
        text = (folder / "records" / f"attempt_{attempt:03d}" / "command.txt").read_text()
        assert shlex.split(text)[-len(job.command) :] == job.command

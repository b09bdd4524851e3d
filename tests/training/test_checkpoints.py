"""Damaged and foreign checkpoints: refused with one sentence, or the last good one found; no tensor is read for it.

Initial weights: the stage's own state may be missing from them, and nothing else.
"""

import argparse
import dataclasses
import logging
import shutil
from pathlib import Path

import megatron_models as models
import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from megatron_l0moe.checkpoints.torch_dist import CheckpointWriter
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runtime import cpu
from megatron_l0moe.training import checkpoints
from megatron_l0moe.training.arguments import JobSettings, StageConfig, settings_as_dict

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(autouse=True)
def process_group():
    with cpu.one_process_group():
        yield


def settings_of(stage: str, **retention) -> JobSettings:
    plan = models.plan(stage, **retention)
    return JobSettings(StageConfig(l0_stage=stage, l0_dense_layers=models.DENSE), plan)


def arguments_of(folder: Path, **changes) -> argparse.Namespace:
    """Return what Megatron's parser makes of a small MoE job."""
    values = {
        "load": str(folder), "pretrained_checkpoint": None, "ckpt_step": None, "finetune": False,
        "override_opt_param_scheduler": False, "num_layers": 3, "hidden_size": 16, "ffn_hidden_size": 24,
        "num_experts": 4, "moe_ffn_hidden_size": 8, "moe_router_topk": 2, "train_iters": 10, "global_batch_size": 4,
        "seq_length": 8, "bf16": False, "use_distributed_optimizer": False, "lr": 1e-3, "min_lr": 0.0,
        "l0_router_lr": 0.0, "l0_train_weights": "on",
    }  # fmt: skip
    return argparse.Namespace(**{**values, **changes})


def write(
    folder: Path, name: str, settings: dict | None, arguments: argparse.Namespace | None = None
) -> Path:
    """Write a checkpoint of one tensor, without processes; the tracker file names it."""
    common = {"args": arguments or arguments_of(folder), "iteration": 0}
    if settings is not None:
        common["l0moe"] = settings
    scratch = folder / "scratch"
    with CheckpointWriter(scratch, common) as writer:
        writer.write("weight", torch.arange(64.0))
    shutil.move(scratch / "release", folder / name)
    shutil.rmtree(scratch)
    (folder / TRACKER).write_text(name.removeprefix("iter_").lstrip("0"))
    return folder / name


@pytest.fixture
def job(tmp_path) -> Path:
    """The folder of a job with two checkpoints."""
    for iteration in (2, 4):
        write(tmp_path, f"iter_{iteration:07d}", settings_as_dict(settings_of("moe")))
    return tmp_path


def found_in(folder: Path) -> str:
    return checkpoints.last_good(folder).reader.path.name


def truncate(path: Path) -> None:
    (file,) = path.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-1])


def without_shard(path: Path) -> None:
    next(path.glob("*.distcp")).unlink()


def without_metadata(path: Path) -> None:
    (path / ".metadata").unlink()


def half_metadata(path: Path) -> None:
    data = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(data[: len(data) // 2])


def no_pickle(path: Path) -> None:
    (path / ".metadata").write_bytes(b"\x80\x04cno_module\nno_name\n.")


def unfinished(path: Path) -> None:
    (path / "metadata.json").unlink()


def no_json(path: Path) -> None:
    (path / "metadata.json").write_text("{")


def gone(path: Path) -> None:
    shutil.rmtree(path)


def settings_unreadable(path: Path) -> None:
    """The bytes of the settings are overwritten in place: sizes are right."""
    (file,) = path.glob("*.distcp")
    data = bytearray(file.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    file.write_bytes(bytes(data))


DAMAGES = [
    truncate, without_shard, without_metadata, half_metadata, no_pickle, unfinished, no_json, gone, settings_unreadable,
]  # fmt: skip


def test_the_named_checkpoint_is_taken(job):
    assert found_in(job) == "iter_0000004"
    (job / TRACKER).write_text("2\n")
    assert found_in(job) == "iter_0000002"  # the tracker file decides, not the number


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_newest_checkpoint_gives_the_one_before(job, damage, caplog):
    damage(job / "iter_0000004")
    with caplog.at_level(logging.WARNING):
        assert found_in(job) == "iter_0000002"
    assert "iter_0000004" in caplog.text
    assert "going on from" in caplog.text


@pytest.mark.parametrize("text", ["", "four", "4 4", "-1", "\x00\x00", "9", "release"])
def test_a_tracker_file_that_names_nothing_gives_the_newest(job, text, caplog):
    (job / TRACKER).write_text(text)
    assert found_in(job) == "iter_0000004"
    assert "going on from" in caplog.text


def test_a_missing_tracker_file_gives_the_newest(job):
    (job / TRACKER).unlink()
    assert found_in(job) == "iter_0000004"


def test_taking_up_repairs_the_tracker_file_and_puts_damaged_folders_aside(job):
    truncate(job / "iter_0000004")
    checkpoints.take_up(job, checkpoints.last_good(job))
    assert (job / TRACKER).read_text().strip() == "2"
    assert sorted(path.name for path in job.glob("*iter*[0-9]")) == ["damaged_0_iter_0000004", "iter_0000002"]
    assert found_in(job) == "iter_0000002"


def test_taking_up_a_whole_folder_changes_nothing(job):
    before = {path: path.stat().st_mtime_ns for path in job.rglob("*")}
    checkpoints.take_up(job, checkpoints.last_good(job))
    assert {path: path.stat().st_mtime_ns for path in job.rglob("*")} == before


def test_with_all_damaged_one_sentence_names_each(job):
    truncate(job / "iter_0000004")
    unfinished(job / "iter_0000002")
    with pytest.raises(
        L0MoEError, match=r"can be used \(.*4.*truncated.*2 was not finished.*\); restore one"
    ) as caught:
        checkpoints.last_good(job)
    assert "\n" not in str(caught.value)


def test_a_first_save_that_was_cut_short_is_no_checkpoint(job, caplog):
    gone(job / "iter_0000002")
    unfinished(job / "iter_0000004")
    (job / TRACKER).unlink()  # Megatron writes it after the save
    assert checkpoints.last_good(job) is None
    assert "starts anew" in caplog.text
    assert checkpoints.last_good(job / "nowhere") is None


def refused(folder: Path, settings: JobSettings, **changes) -> str:
    with pytest.raises(L0MoEError) as caught:
        checkpoints.choose(arguments_of(folder, **changes), settings)
    assert str(caught.value).count("\n") == 0
    return str(caught.value)


def test_a_jobs_own_checkpoint_is_accepted(job):
    assert checkpoints.choose(arguments_of(job), settings_of("moe")) == "own"
    assert checkpoints.choose(arguments_of(job, ckpt_step=2), settings_of("moe")) == "own"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": 8}, "--num-experts 4, but this job has 8"),
        ({"moe_ffn_hidden_size": 16}, "--moe-ffn-hidden-size 8, but this job has 16"),
        ({"hidden_size": 32}, "--hidden-size 16, but this job has 32"),
        ({"train_iters": 20}, "--train-iters 10, but this job has 20"),
        ({"l0_router_lr": 0.1}, "--l0-router-lr 0.0, but this job has 0.1"),
        ({"bf16": True}, "--bf16 False, but this job has True"),
        ({"use_distributed_optimizer": True}, "--use-distributed-optimizer False, but this job has True"),
    ],
)
def test_a_checkpoint_of_another_recipe_is_refused(job, changes, words):
    assert words in refused(job, settings_of("moe"), **changes)


def test_other_stages_widths_and_dense_layers_are_refused(job):
    assert "is of the stage 'moe'" in refused(job, settings_of("expert"))
    assert "--l0-expert-ffn 8, but this job has 12" in refused(job, settings_of("moe", l0_expert_ffn=12))
    other = settings_of("moe")
    other = JobSettings(other.stage, dataclasses.replace(other.plan, dense_layers=2))
    assert "--l0-dense-layers 1, but this job has 2" in refused(job, other)


def test_a_new_schedule_has_to_be_said(job):
    args = arguments_of(job, train_iters=20, lr=2e-3, override_opt_param_scheduler=True)
    assert checkpoints.choose(args, settings_of("moe")) == "own"


def test_a_foreign_checkpoint_is_not_passed_over_for_an_older_one(job):
    write(job, "iter_0000006", settings_as_dict(settings_of("expert")))
    assert "is of the stage 'expert'" in refused(job, settings_of("moe"))
    assert (job / TRACKER).read_text() == "6"  # nothing was repaired


@pytest.mark.parametrize("settings", [None, {}, {"l0_temperature": 0.83}])
def test_a_checkpoint_without_settings_is_refused(tmp_path, settings):
    write(tmp_path, "iter_0000004", settings)
    assert "holds no L0 settings" in refused(tmp_path, settings_of("moe"))
    assert "holds no L0 settings" in refused(
        tmp_path / "own", settings_of("expert"), pretrained_checkpoint=str(tmp_path)
    )


def test_initial_weights_must_be_of_the_stage_before(tmp_path):
    own, dense, moe = (tmp_path / name for name in ("own", "dense", "moe"))
    for folder in (dense, moe):
        folder.mkdir()
        write(folder, "release", {"stage": folder.name}, argparse.Namespace(num_layers=3, num_experts=4))
    start = arguments_of(own, pretrained_checkpoint=str(dense))
    assert checkpoints.choose(start, settings_of("expert")) == "initial"
    words = refused(own, settings_of("moe"), pretrained_checkpoint=str(dense))
    assert "is of the stage 'dense', but --l0-stage moe takes one of the stage 'moe'" in words
    words = refused(own, settings_of("moe"), pretrained_checkpoint=str(moe), num_experts=8)
    assert "--num-experts 4, but this job has 8" in words
    without_shard(moe / "release")
    assert "is missing" in refused(own, settings_of("moe"), pretrained_checkpoint=str(moe))


def test_no_checkpoint_at_all(tmp_path):
    words = refused(tmp_path, settings_of("expert"), pretrained_checkpoint=str(tmp_path))
    assert "holds no Megatron checkpoint; run the stage before 'expert' first" in words
    assert checkpoints.choose(arguments_of(tmp_path), settings_of("expert")) == "nothing"


def test_the_refusal_reaches_every_rank_as_a_sentence(tmp_path):
    write(tmp_path, "iter_0000004", None)
    with pytest.raises(L0MoEError, match="holds no L0 settings"):
        checkpoints.check([], arguments_of(tmp_path), settings_of("moe"))


def write_keys(folder: Path, keys: set[str]) -> argparse.Namespace:
    save({key: torch.zeros(1) for key in keys}, storage_writer=FileSystemWriter(folder / "release"))
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    return argparse.Namespace(pretrained_checkpoint=str(folder))


@pytest.mark.parametrize("stage", ["expert", "dsmoe", "mom"])
def test_dense_weights_start_the_stage(tmp_path, stage):
    args = write_keys(tmp_path, checkpoints.model_keys(models.build("dense")))
    checkpoints.check_keys([models.build(stage)], args)


def test_a_missing_weight_is_named(tmp_path):
    keys = checkpoints.model_keys(models.build("dense"))
    args = write_keys(tmp_path, keys - {"decoder.layers.1.mlp.linear_fc2.weight"})
    with pytest.raises(
        L0MoEError, match=r"lacks decoder\.layers\.1\.mlp\.linear_fc2\.weight \(1 tensors in all\)"
    ):
        checkpoints.check_keys([models.build("expert")], args)


def test_dense_weights_do_not_start_the_moe_stage(tmp_path):
    args = write_keys(tmp_path, checkpoints.model_keys(models.build("dense")))
    with pytest.raises(L0MoEError, match="another stage"):
        checkpoints.check_keys([models.build("moe")], args)

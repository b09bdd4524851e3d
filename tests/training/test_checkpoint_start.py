"""Initial weights: the stage's own state may be missing from them, and nothing else."""

import argparse
from pathlib import Path

import megatron_models as models
import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runtime import cpu
from megatron_l0moe.training import checkpoints


@pytest.fixture(autouse=True)
def process_group():
    with cpu.one_process_group():
        yield


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

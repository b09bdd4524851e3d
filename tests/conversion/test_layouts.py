"""Converted and assembled checkpoints go through Megatron at other parallel sizes, and come out with the same bytes.

Megatron's own loader cuts a checkpoint of many chunks to its ranks; its own writer saves their parts; the export puts
those together again. Two real gloo processes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversion.toy_checkpoints import save_model
from conversion.toy_moe import DENSE_LAYERS, TOP_K, make_moe

from megatron_l0moe.checkpoints import rules
from megatron_l0moe.checkpoints.safetensors_files import SafetensorsFolder
from megatron_l0moe.checkpoints.torch_dist import CheckpointReader
from megatron_l0moe.conversion.export import export_dense, export_moe

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
ROOT = Path(__file__).parents[2]
SIZES = {
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "EP2": {"expert": 2},
    "TP2, EP2": {"tensor": 2, "expert": 2},
}
FAMILY = "qwen2"  # biases too
BLOCK = 300  # values; every matrix is in several chunks


@pytest.fixture(scope="module")
def resaved(tmp_path_factory):
    """Folder with hf/, convert/, assemble/, and both checkpoints from every layout."""
    folder = tmp_path_factory.mktemp("layouts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "BLOCK_VALUES", BLOCK)
        make_moe(folder, FAMILY)
    jobs = [
        {
            "checkpoint": str(folder / stage / "megatron/release"),
            "out": str(folder / layout / stage),
            "sizes": sizes,
        }
        for layout, sizes in SIZES.items()
        for stage in ("convert", "assemble")
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("megatron_resave.py")
    command = [sys.executable, str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    logs = [folder / f"log{rank}" for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        words = [*command, str(rank), "2", str(folder / "store"), str(folder / "jobs.json")]
        with log.open("w") as file:
            processes.append(subprocess.Popen(words, env=environment, stdout=file, stderr=file))
    codes = [process.wait(timeout=300) for process in processes]
    assert codes == [0, 0], "".join(log.read_text()[-3000:] for log in logs)
    return folder


def same(one, two):
    a, b = SafetensorsFolder(one), SafetensorsFolder(two)
    return a.names == b.names and all(torch.equal(a.read(name), b.read(name)) for name in a.names)


@pytest.mark.parametrize("layout", SIZES)
def test_the_export_is_the_same_from_every_layout(resaved, tmp_path, layout):
    stored = CheckpointReader(resaved / layout / "assemble")
    if layout != "PP2":  # there every rank has whole tensors
        name = "decoder.layers.2.mlp.experts.experts.linear_fc1.weight"
        assert len(stored._entry(name).chunks) > 1
    export_dense(resaved / layout / "convert", resaved / "hf", tmp_path / "dense")
    assert same(tmp_path / "dense", resaved / "hf")
    moes = {"here": resaved / "assemble/megatron", "there": resaved / layout / "assemble"}
    for name, checkpoint in moes.items():
        export_moe(checkpoint, resaved / "hf", tmp_path / name, dense_layers=DENSE_LAYERS, top_k=TOP_K)
    assert same(tmp_path / "here", tmp_path / "there")


def test_control_another_model_is_another_export(resaved, tmp_path):
    assert len(CheckpointReader(resaved / "convert/megatron")._entry("output_layer.weight").chunks) > 1
    assert not same(save_model(tmp_path / "other", FAMILY, seed=1), resaved / "hf")

"""The checkpoint that we write is one that Megatron itself loads, into models that compute what the source computes."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversion.reference import MoELayer, forward
from conversion.toy_checkpoints import (
    FFN,
    LAYERS,
    MODELS,
    VOCAB,
    save_model,
    sizes_of,
    state_of,
    write_expert_run,
)

from megatron_l0moe.conversion.convert import convert_dense
from megatron_l0moe.conversion.megatron_checkpoint import (
    CheckpointReader,
    CheckpointWriter,
    common_state,
)
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.experts.expert_file import ExpertFile
from megatron_l0moe.experts.extraction import extract_expert
from megatron_l0moe.experts.merging import assemble

# float32 Megatron against a float64 reference; logits are of size 10
FP32_LOGITS_ATOL = 1e-4
DENSE_LAYERS, EXPERTS, WIDTH, TOP_K = 1, 4, 20, 2


def write_tiny(folder, tensors, common=None):
    with CheckpointWriter(folder, common or {"iteration": 0}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return folder


def make_moe(folder: Path) -> tuple[Path, list[ExpertFile]]:
    """A tiny L0-MoE out of a random dense model in folder/hf and expert runs with other weights each."""
    convert_dense(save_model(folder / "hf"), folder / "convert")
    files = []
    for k in range(EXPERTS):

        def change(name, tensor, k=k):
            if "linear_fc" not in name or "norm" in name:
                return tensor
            return tensor * (1 + 0.1 * k)

        run = write_expert_run(
            folder / f"run{k}",
            folder / "convert/megatron",
            dense_layers=DENSE_LAYERS,
            seed=k,
            keep=WIDTH if k % 2 else None,
            change=change,
        )
        files.append(folder / f"expert{k}.safetensors")
        extract_expert(run, files[-1], width=WIDTH)
    assemble(folder / "convert/megatron", files, folder / "assemble", top_k=TOP_K)
    return folder / "assemble/megatron", [ExpertFile(file) for file in files]


def reference_moe(megatron: Path, files: list[ExpertFile]) -> dict[int, MoELayer]:
    reader = CheckpointReader(megatron)
    return {
        layer: MoELayer(
            router=reader.read(f"decoder.layers.{layer}.mlp.router.weight"),
            experts=[tuple(file.read(layer, part) for part in ("gate", "up", "down")) for file in files],
            top_k=TOP_K,
        )
        for layer in range(DENSE_LAYERS, LAYERS)
    }


@pytest.fixture(scope="module")
def megatron(tmp_path_factory):
    """Logits that Megatron and the reference compute for every toy model: name -> (megatron, reference)."""
    root = tmp_path_factory.mktemp("megatron")
    ids = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    jobs, expected = [], {}
    for name in MODELS:
        source = save_model(root / name / "hf", name)
        convert_dense(source, root / name)
        jobs.append({"name": name, "checkpoint": str(root / name / "megatron/release")})
        expected[name] = forward(state_of(source), sizes_of(source), ids)
    moe, files = make_moe(root / "moe")
    jobs.append({"name": "moe", "checkpoint": str(moe / "release")})
    hf = root / "moe/hf"
    expected["moe"] = forward(state_of(hf), sizes_of(hf), ids, reference_moe(moe, files))
    for job in jobs:
        job["ids"] = ids.tolist()
    (root / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("megatron_logits.py")
    command = [sys.executable, str(script), str(root / "jobs.json"), str(root / "logits.pt")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    logits = torch.load(root / "logits.pt")
    return {name: (logits[name].double(), expected[name]) for name in expected}


@pytest.mark.parametrize("name", [*MODELS, "moe"])
def test_megatron_loads_every_key_and_computes_the_same_logits(megatron, name):
    got, expected = megatron[name]
    torch.testing.assert_close(got, expected, atol=FP32_LOGITS_ATOL, rtol=0)


def test_control_another_model_has_other_logits(megatron):
    assert (megatron["llama"][0] - megatron["llama3.1"][1]).abs().max() > 100 * FP32_LOGITS_ATOL
    assert (megatron["llama"][0] - megatron["moe"][1]).abs().max() > 100 * FP32_LOGITS_ATOL


def test_write_and_read_whole_tensors_of_all_dtypes(tmp_path):
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.randn(5).bfloat16(),
        "c": torch.tensor([1], dtype=torch.int64),
        "view": torch.randn(10, 10)[2:4, ::3],
    }
    reader = CheckpointReader(write_tiny(tmp_path, tensors))
    assert reader.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        assert reader.dtype(name) is tensor.dtype
        assert torch.equal(reader.read(name), tensor)
    assert reader.common == {"iteration": 0}


def test_chunks_are_put_together_and_rows_are_read_alone(tmp_path):
    whole = torch.arange(24.0).view(3, 2, 4)
    with CheckpointWriter(tmp_path, {}) as writer:
        for k in (2, 0, 1):
            writer.write("experts", whole[k : k + 1], offset=(k, 0, 0), shape=(3, 2, 4))
        for column in range(2):
            part = whole[:, column : column + 1]
            writer.write("columns", part, offset=(0, column, 0), shape=(3, 2, 4))
    reader = CheckpointReader(tmp_path)
    for name in ("experts", "columns"):
        assert torch.equal(reader.read(name), whole)
        assert all(torch.equal(reader.read(name, row=k), whole[k]) for k in range(3))


def test_a_tensor_with_a_hole_is_our_bug_and_leaves_nothing(tmp_path):
    with pytest.raises(AssertionError, match="4 of 8 values"), CheckpointWriter(tmp_path, {}) as writer:
        writer.write("half", torch.zeros(1, 4), offset=(0, 0), shape=(2, 4))
    assert list(tmp_path.iterdir()) == []


def test_files_are_split_by_size(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_l0moe.conversion.megatron_checkpoint.MAX_FILE_BYTES", 1000)
    tensors = {f"t{i}": torch.randn(200) for i in range(5)}
    reader = CheckpointReader(write_tiny(tmp_path, tensors))
    assert len(list((tmp_path / "release").glob("*.distcp"))) == 6
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())


def test_an_interrupted_write_leaves_nothing_and_a_leftover_is_replaced(tmp_path):
    def interrupted():
        with CheckpointWriter(tmp_path, {}) as writer:
            writer.write("a", torch.zeros(3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "release").mkdir()
    (tmp_path / "release/__0_0.distcp").write_bytes(b"old")
    assert torch.equal(CheckpointReader(write_tiny(tmp_path, {"a": torch.ones(2)})).read("a"), torch.ones(2))


def test_settings_come_from_ours_over_megatrons_arguments(tmp_path):
    common = common_state({"l0_temperature": 0.5, "l0_stage": "expert", "seed": 1}, {"l0_stage": "moe"}, 8)
    settings = CheckpointReader(write_tiny(tmp_path, {"a": torch.zeros(1)}, common)).settings
    assert settings == {"l0_temperature": 0.5, "l0_stage": "moe", "version": 1}


def test_an_iteration_folder_is_found_by_the_tracker_file(tmp_path):
    write_tiny(tmp_path, {"a": torch.ones(2)})
    (tmp_path / "release").rename(tmp_path / "iter_0000060")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("60\n")
    assert CheckpointReader(tmp_path).path == tmp_path / "iter_0000060"
    assert CheckpointReader(tmp_path / "iter_0000060").read("a").tolist() == [1, 1]


def test_legacy_common_file_is_read(tmp_path):
    write_tiny(tmp_path, {"a": torch.ones(2)})
    torch.save({"iteration": 7}, tmp_path / "release/common.pt")
    assert CheckpointReader(tmp_path).common == {"iteration": 7}


def truncate(file, keep=100):
    file.write_bytes(file.read_bytes()[:keep])


def damage_tensor(folder):
    """Overwrite the bytes of tensor `a` in place: the file keeps its length."""
    file = folder / "release/__0_0.distcp"
    metadata = pickle.loads((folder / "release/.metadata").read_bytes())
    (info,) = [info for index, info in metadata.storage_data.items() if index.fqn == "a"]
    data = bytearray(file.read_bytes())
    data[info.offset : info.offset + info.length] = bytes(info.length)
    file.write_bytes(data)


BAD_CHECKPOINTS = {
    "no folder": (lambda folder: os.rename(folder, f"{folder}.gone"), "holds no Megatron checkpoint"),
    "no tracker": (
        lambda f: (f / "latest_checkpointed_iteration.txt").unlink(),
        "holds no Megatron checkpoint",
    ),
    "odd tracker": (
        lambda f: (f / "latest_checkpointed_iteration.txt").write_text("x"),
        "or an iteration number, got 'x'",
    ),
    "gone iteration": (
        lambda f: (f / "latest_checkpointed_iteration.txt").write_text("9"),
        "iter_0000009.*missing",
    ),
    "no metadata": (lambda f: (f / "release/.metadata").unlink(), "no .metadata file"),
    "short metadata": (lambda f: truncate(f / "release/.metadata"), "metadata is truncated"),
    "no data": (lambda f: (f / "release/__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "short data": (lambda f: truncate(f / "release/__0_0.distcp"), r"truncated \(100 of \d+ bytes\)"),
    "damaged data": (damage_tensor, "damaged at the tensor a"),
    "other format": (
        lambda f: (f / "release/metadata.json").write_text('{"sharded_backend": "zarr"}'),
        "format 'zarr'",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS.keys())
def test_bad_checkpoints_stop_with_one_sentence(tmp_path, damage, message):
    folder = write_tiny(tmp_path / "checkpoint", {"a": torch.randn(1000)})
    damage(folder)
    with pytest.raises(L0MoEError, match=message):
        CheckpointReader(folder).read("a")


def test_a_tensor_that_is_not_there_stops_with_its_name(tmp_path):
    reader = CheckpointReader(write_tiny(tmp_path, {"a": torch.zeros(1)}))
    with pytest.raises(L0MoEError, match=r"has no tensor decoder\.x"):
        reader.read("decoder.x")


def test_expert_widths_fit_the_toy_model():
    assert WIDTH < FFN

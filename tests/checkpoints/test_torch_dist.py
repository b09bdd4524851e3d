"""Checkpoints tensor by tensor: what is written is read again, damage is named (Megatron itself: test_families.py)."""

import os
import pickle
import shutil

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_l0moe.checkpoints.torch_dist import CheckpointReader, CheckpointWriter, common_state
from megatron_l0moe.errors import L0MoEError


def write_tiny(folder, tensors, common=None):
    with CheckpointWriter(folder, common or {"iteration": 0}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return folder


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
        assert all(torch.equal(reader.read(name, k, k + 1), whole[k : k + 1]) for k in range(3))


def test_a_tensor_with_a_hole_is_our_bug_and_leaves_nothing(tmp_path):
    with pytest.raises(AssertionError, match="4 of 8 values"), CheckpointWriter(tmp_path, {}) as writer:
        writer.write("half", torch.zeros(1, 4), offset=(0, 0), shape=(2, 4))
    assert list(tmp_path.iterdir()) == []


def test_files_are_split_by_size(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_l0moe.checkpoints.torch_dist.MAX_FILE_BYTES", 1000)
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


def edit_metadata(folder, change):
    file = folder / "release/.metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


def other_shape(folder):
    """The metadata says [10, 100] of what was saved as [1000]."""

    def change(metadata):
        entry = metadata.state_dict_metadata["a"]
        entry.size = entry.chunks[0].sizes = torch.Size([10, 100])
        entry.chunks[0].offsets = torch.Size([0, 0])
        (old,) = [index for index in metadata.storage_data if index.fqn == "a"]
        metadata.storage_data[MetadataIndex("a", [0, 0])] = metadata.storage_data.pop(old)

    edit_metadata(folder, change)


def hole(folder):
    """Half of the tensor's chunks are gone from the metadata."""

    def change(metadata):
        chunks = metadata.state_dict_metadata["a"].chunks
        chunks[:] = [chunk for chunk in chunks if chunk.offsets[0] != 600]

    shutil.rmtree(folder)
    with CheckpointWriter(folder, {}) as writer:
        for begin, end in ((0, 600), (600, 1000)):
            writer.write("a", torch.ones(end - begin), offset=(begin,), shape=(1000,))
    edit_metadata(folder, change)


def no_place(folder):
    def change(metadata):
        metadata.storage_data = {k: v for k, v in metadata.storage_data.items() if k.fqn != "a"}

    edit_metadata(folder, change)


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
    "superscript tracker": (
        lambda f: (f / "latest_checkpointed_iteration.txt").write_text("\u00b2", encoding="utf-8"),
        "or an iteration number, got '\u00b2'",
    ),
    "tracker in no encoding": (
        lambda f: (f / "latest_checkpointed_iteration.txt").write_bytes(b"\xff1"),
        "or an iteration number",
    ),
    "endless tracker": (
        lambda f: (f / "latest_checkpointed_iteration.txt").write_text("9" * 5000),
        "iter_9999.*is missing or incomplete",
    ),
    "other shape": (other_shape, "damaged at the tensor a"),
    "hole": (hole, "holds 600 of 1000 values of the tensor a"),
    "no place": (no_place, "does not say where the tensor a lies"),
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

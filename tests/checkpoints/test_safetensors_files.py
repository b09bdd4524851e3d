"""Streamed safetensors: the library reads what we write, we read what it writes, damage is named."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_l0moe.checkpoints.safetensors_files import INDEX_NAME, SafetensorsFolder, SafetensorsWriter
from megatron_l0moe.errors import L0MoEError

TENSORS = {
    "a": torch.randn(3, 4),
    "b": torch.randn(7).bfloat16(),
    "c": torch.randn(2, 2, 2).half(),
    "d": torch.arange(5),
    "e": torch.tensor(2.5),
    "f": torch.randn(6, 6).t()[1:3],
    "g": torch.empty(0, 4),
}


def write(folder, tensors=TENSORS, **changes):
    with SafetensorsWriter(folder, tensors, **changes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return folder


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype is tensor.dtype
        assert torch.equal(got[name], tensor)


def read_all(folder):
    source = SafetensorsFolder(folder)
    assert all(source.shape(name) == tuple(TENSORS[name].shape) for name in source.names)
    return {name: source.read(name) for name in source.names}


def test_one_file(tmp_path):
    write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert_equal(load_file(tmp_path / "model.safetensors"), TENSORS)
    assert_equal(read_all(tmp_path), TENSORS)


def test_shards_with_an_index(tmp_path):
    write(tmp_path, max_shard_bytes=60)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert set(index["weight_map"]) == set(TENSORS)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in TENSORS.values())
    merged = {}
    for name in set(index["weight_map"].values()):
        assert name.endswith(f"-of-{len(set(index['weight_map'].values())):05d}.safetensors")
        merged.update(load_file(tmp_path / name))
    assert_equal(merged, TENSORS)
    assert_equal(read_all(tmp_path), TENSORS)


def test_files_of_the_library_are_read(tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert_equal(read_all(tmp_path), TENSORS)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_leave_nothing(tmp_path, value):
    with pytest.raises(L0MoEError, match="x holds 1 values that are NaN or infinite"):
        write(tmp_path / "out", {"a": torch.zeros(2), "x": torch.tensor([0.0, value])})
    assert list((tmp_path / "out").iterdir()) == []


def test_an_existing_checkpoint_is_kept(tmp_path):
    write(tmp_path)
    with pytest.raises(L0MoEError, match=r"already holds a checkpoint \(model\.safetensors\)"):
        write(tmp_path, {"a": torch.zeros(1)})
    assert_equal(read_all(tmp_path), TENSORS)
    (tmp_path / "file").write_text("")
    with pytest.raises(L0MoEError, match="file is a file"):
        write(tmp_path / "file")


def test_a_forgotten_tensor_is_our_bug(tmp_path):
    with (
        pytest.raises(AssertionError, match="never written"),
        SafetensorsWriter(tmp_path, ["a", "b"]) as writer,
    ):
        writer.write("a", torch.zeros(1))


def keep(folder, count):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:count])


@pytest.mark.parametrize("count", [0, 5, 20, -1, -300])
def test_truncated_at_any_place(tmp_path, count):
    save_file({"a": torch.randn(100, 10)}, tmp_path / "model.safetensors")
    keep(tmp_path, count)
    with pytest.raises(L0MoEError, match=r"model\.safetensors is truncated or not a safetensors file"):
        SafetensorsFolder(tmp_path)


def test_another_file_format(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0notJSON")
    with pytest.raises(L0MoEError, match="not a safetensors file"):
        SafetensorsFolder(tmp_path)


GOOD_ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
BAD_HEADERS = {
    "a list": [1],
    "a number": 5,
    "no entry": {"a": None},
    "text": {"a": "F32"},
    "no offsets": {"a": {"dtype": "F32", "shape": [2, 2]}},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 16]}},
    "no dtype": {"a": {"shape": [2, 2], "data_offsets": [0, 16]}},
    "one offset": {"a": {**GOOD_ENTRY, "data_offsets": [16]}},
    "before the data": {"a": {**GOOD_ENTRY, "data_offsets": [-16, 0]}},
    "after the file": {"a": {**GOOD_ENTRY, "data_offsets": [8, 24]}},
    "backwards": {"a": {**GOOD_ENTRY, "data_offsets": [16, 0]}},
    "fractions": {"a": {**GOOD_ENTRY, "data_offsets": [0.0, 16.0]}},
    "too few bytes": {"a": {**GOOD_ENTRY, "data_offsets": [0, 12]}},
    "negative shape": {"a": {**GOOD_ENTRY, "shape": [-2, -2]}},
    "dtype list": {"a": {**GOOD_ENTRY, "dtype": ["F32"]}},
}


def write_header(folder, header):
    encoded = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(16))


@pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_damaged_headers(tmp_path, header):
    write_header(tmp_path, {"a": GOOD_ENTRY})
    assert SafetensorsFolder(tmp_path).read("a").shape == (2, 2)  # control
    write_header(tmp_path, header)
    with pytest.raises(L0MoEError, match=r"model\.safetensors is truncated or not a safetensors file"):
        SafetensorsFolder(tmp_path)


def test_folders_without_usable_weights(tmp_path):
    with pytest.raises(L0MoEError, match=r"holds no \*\.safetensors file"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(L0MoEError, match=r"holds pickled weights \(pytorch_model\.bin\)"):
        SafetensorsFolder(tmp_path)


def test_inconsistent_indices(tmp_path):
    write(tmp_path, max_shard_bytes=60)
    index_file = tmp_path / INDEX_NAME
    index = json.loads(index_file.read_text())
    first, other = sorted(set(index["weight_map"].values()))[:2]
    index_file.write_text(json.dumps({"weight_map": {**index["weight_map"], "ghost": first}}))
    with pytest.raises(L0MoEError, match=f"{first} holds the tensor ghost, but it does not"):
        SafetensorsFolder(tmp_path)
    index_file.write_text(json.dumps({"weight_map": {**index["weight_map"], "a": other}}))
    with pytest.raises(L0MoEError, match="holds the tensor a, but it does not"):
        SafetensorsFolder(tmp_path)
    index_file.write_text("{}")
    with pytest.raises(L0MoEError, match="is not a valid safetensors index"):
        SafetensorsFolder(tmp_path)
    index_file.write_text(json.dumps(index))
    (tmp_path / other).unlink()
    with pytest.raises(L0MoEError, match=f"{other} is missing, but {INDEX_NAME} names it"):
        SafetensorsFolder(tmp_path)


def index_of(folder, weight_map):
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_tensor_in_two_files(tmp_path):
    for name in ("one", "two"):
        save_file({name: torch.zeros(1), "a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    index_of(tmp_path, {name: f"{name}.safetensors" for name in ("one", "two")})
    with pytest.raises(L0MoEError, match=r"tensor a is in both one\.safetensors and two\.safetensors"):
        SafetensorsFolder(tmp_path)


def test_of_two_sets_the_one_that_transformers_loads(tmp_path, caplog):
    old, new = ({"a": torch.full((2,), value)} for value in (1.0, 2.0))
    save_file(old, tmp_path / "model-00001-of-00001.safetensors")
    index_of(tmp_path, {"a": "model-00001-of-00001.safetensors"})
    assert SafetensorsFolder(tmp_path).read("a").tolist() == [1, 1]
    assert not caplog.text
    save_file(new, tmp_path / "model.safetensors")
    assert SafetensorsFolder(tmp_path).read("a").tolist() == [2, 2]
    assert "read from model.safetensors, as transformers does; not read: model-00001-of-00001" in caplog.text
    assert INDEX_NAME in caplog.text


def test_what_else_lies_beside_the_weights(tmp_path, caplog):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    others = (
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "pytorch_model.bin",
        "m.gguf",
        "model-00009.safetensors",
    )
    for name in others:
        (tmp_path / name).write_bytes(b"not even opened")
    assert SafetensorsFolder(tmp_path).names == {"a"}
    assert all(name in caplog.text for name in others)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(L0MoEError, match=r"adapter_config\.json says that the folder is an adapter"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(L0MoEError, match=r"holds pickled weights \(pytorch_model\.bin\)"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(
        L0MoEError, match=r"holds consolidated\.safetensors, but neither model\.safetensors nor"
    ):
        SafetensorsFolder(tmp_path)


BAD_PLACES = {
    "outside": "../model.safetensors",
    "absolute": "/tmp/model.safetensors",
    "below": "sub/model.safetensors",
    "number": 5,
    "null": None,
    "list": ["model.safetensors"],
    "long": "x" * 5000 + ".safetensors",
    "zero byte": "a\0.safetensors",
    "pickle": "model.bin",
}


@pytest.mark.parametrize("place", BAD_PLACES.values(), ids=BAD_PLACES.keys())
def test_an_index_names_files_of_its_own_folder_only(tmp_path, place):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")  # where `../` leads
    index_of(folder, {"a": place})
    with pytest.raises(L0MoEError, match=r"as the file of the tensor a, but it must be the name of"):
        SafetensorsFolder(folder)


def test_deep_nesting_is_damage(tmp_path):
    deep = b'{"weight_map": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    (tmp_path / INDEX_NAME).write_bytes(deep)
    with pytest.raises(L0MoEError, match="nested too deeply"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(deep)) + deep)
    with pytest.raises(L0MoEError, match="not a safetensors file"):
        SafetensorsFolder(tmp_path)


def test_two_tensors_over_the_same_bytes(tmp_path):
    half = {**GOOD_ENTRY, "shape": [2], "data_offsets": [0, 8]}
    write_header(tmp_path, {"a": half, "b": {**half, "data_offsets": [8, 16]}})
    assert SafetensorsFolder(tmp_path).names == {"a", "b"}  # control
    write_header(tmp_path, {"a": half, "b": {**half, "data_offsets": [4, 12]}})
    with pytest.raises(
        L0MoEError, match=r"model\.safetensors says that the tensors a and b lie in the same bytes"
    ):
        SafetensorsFolder(tmp_path)

"""A checkpoint's metadata is read without running what it asks for, by us and by Megatron's own loader."""

import os
import pathlib
import pickle
import subprocess
import sys

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_l0moe.checkpoints.torch_dist import CheckpointReader, CheckpointWriter
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runtime.checkpoint_metadata import read_metadata


class Planted:
    """Unpickles by running a command that makes the file `PWNED` beside the checkpoint."""

    def __init__(self, folder):
        self.command = f"touch {folder / 'PWNED'}"

    def __reduce__(self):
        return os.system, (self.command,)


class PlantedInEval(Planted):
    def __reduce__(self):
        return eval, (f"__import__('os').system({self.command!r})",)


def checkpoint(folder, change=lambda metadata: metadata):
    """A checkpoint of one tensor whose metadata is changed after the write."""
    with CheckpointWriter(folder, {"iteration": 0}) as writer:
        writer.write("a", torch.arange(6.0).view(3, 2))
    file = folder / "release/.metadata"
    file.write_bytes(pickle.dumps(change(pickle.loads(file.read_bytes()))))
    return folder


def beside(value):
    """Everything as it should be, and one thing more where torch keeps anything."""

    def change(metadata):
        metadata.planner_data = value
        return metadata

    return change


def test_the_planted_command_works_where_nothing_holds_it(tmp_path):
    folder = checkpoint(tmp_path / "c", lambda _: Planted(tmp_path))
    pickle.loads((folder / "release/.metadata").read_bytes())
    assert (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("kind", [Planted, PlantedInEval])
@pytest.mark.parametrize("whole", [True, False])
def test_a_planted_command_is_refused_by_name(tmp_path, kind, whole):
    evil = kind(tmp_path)
    folder = checkpoint(tmp_path / "c", (lambda _: evil) if whole else beside([evil]))
    with pytest.raises(L0MoEError, match=r"\.metadata asks for (posix\.system|builtins\.eval), which"):
        CheckpointReader(folder)
    assert not (tmp_path / "PWNED").exists()


def test_what_hides_behind_a_known_class_is_refused(tmp_path):
    """STACK_GLOBAL follows dots: Metadata.__init__.__globals__ would reach the os module."""
    folder = checkpoint(tmp_path / "c")
    module, name = b"torch.distributed.checkpoint.metadata", b"Metadata.__init__.__globals__"
    parts = b"".join(b"\x8c" + bytes([len(text)]) + text for text in (module, name))
    (folder / "release/.metadata").write_bytes(b"\x80\x04" + parts + b"\x93.")
    with pytest.raises(L0MoEError, match=r"asks for .*__globals__"):
        CheckpointReader(folder)


def test_megatrons_own_loader_reads_it_in_the_same_way(tmp_path):
    """In one process: refused with our reader in place, run by torch's own."""
    folder = checkpoint(tmp_path / "c", beside(Planted(tmp_path)))
    program = """
import sys
from pathlib import Path
from torch.distributed.checkpoint import FileSystemReader
from megatron_l0moe.runtime import checkpoint_fixes, cpu
torchs_own = FileSystemReader.read_metadata
cpu.install()
checkpoint_fixes.install()
from megatron.core import dist_checkpointing
path, planted = sys.argv[1], Path(sys.argv[2])
try:
    dist_checkpointing.load_common_state_dict(path)
except BaseException as error:  # as what torch passes the sentence on
    print("asks for posix.system" in str(error), planted.exists())
torchs_own(FileSystemReader(path))
print("torch's own:", planted.exists())
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder / "release"), str(tmp_path / "PWNED")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.split("\n")[:2] == ["True False", "torch's own: True"], done.stderr[-2000:]


def described(**changes):
    """The metadata of a [3, 2] tensor `a` and an object, as torch writes it."""
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([3, 2]))
    facts = {
        "size": torch.Size([3, 2]),
        "chunks": [chunk],
        "path": "__0_0.distcp",
        "offset": 0,
        "dtype": torch.bfloat16,
    }
    facts |= changes
    tensor = TensorStorageMetadata(TensorProperties(facts["dtype"]), facts["size"], facts["chunks"])
    metadata = Metadata(
        {"a": tensor, "object": BytesStorageMetadata()},
        planner_data={"a": ("model", "a")},
        storage_data={MetadataIndex("a", [0, 0], 0): _StorageInfo(facts["path"], facts["offset"], 12)},
        storage_meta=StorageMeta(checkpoint_id=pathlib.Path("somewhere/else")),
    )
    # As Megatron does, so that a later save can compare.
    write = TensorWriteData(chunk, TensorProperties(torch.float32), torch.Size([3, 2]))
    item = WriteItem(MetadataIndex("a", [0, 0]), WriteItemType.SHARD, None, write)
    other = WriteItem(MetadataIndex("object"), WriteItemType.BYTE_IO, BytesIOWriteData(5))
    metadata.all_local_plans = [SavePlan([item, other], _StoragePrefix("__0_"), None)]
    return metadata


@pytest.mark.parametrize("protocol", [2, pickle.DEFAULT_PROTOCOL, pickle.HIGHEST_PROTOCOL])
def test_all_that_torch_writes_is_read(tmp_path, protocol):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(described(), protocol))
    got, expected = read_metadata(tmp_path), FileSystemReader(tmp_path).read_metadata()
    assert got.state_dict_metadata == expected.state_dict_metadata
    assert got.storage_data == expected.storage_data
    assert got.planner_data == expected.planner_data
    assert got.all_local_plans == expected.all_local_plans
    assert got.state_dict_metadata["a"].properties.dtype is torch.bfloat16


@pytest.mark.parametrize("path", ["../outside.distcp", "/etc/passwd", "a/../../outside", "a/.."])
def test_no_path_leaves_the_folder(tmp_path, path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(described(path=path)))
    with pytest.raises(L0MoEError, match=r"\.metadata says that tensors lie in .*, outside its folder"):
        read_metadata(tmp_path)


BEYOND = ChunkStorageMetadata(torch.Size([2, 0]), torch.Size([3, 2]))
FLAT = ChunkStorageMetadata(torch.Size([0]), torch.Size([6]))


@pytest.mark.parametrize(
    "wrong",
    [
        *({"offset": -1}, {"offset": "x"}, {"path": 3}, {"path": ""}, {"path": "a\0b"}, {"dtype": "float32"}),
        *({"size": None}, {"size": (3, -2)}, {"chunks": None}, {"chunks": [3]}, {"chunks": [BEYOND]}),
        {"chunks": [FLAT]},
    ],
    ids=str,
)
def test_values_of_another_kind_are_damage(tmp_path, wrong):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(described(**wrong)))
    with pytest.raises(L0MoEError, match=r"\.metadata is truncated or damaged"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("data", [b"", b"\x80", b"\0" * 64, pickle.dumps(3), pickle.dumps({"a": 1})])
def test_other_bytes_are_damage(tmp_path, data):
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(L0MoEError, match=r"\.metadata is truncated or damaged"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("name", ["MCoreMetadata", "MCoreSavePlan"])
def test_classes_of_older_megatrons_are_known(tmp_path, name):
    """Their classes went, their checkpoints did not; the other class of this module's name is refused."""
    module = "megatron.core.dist_checkpointing.strategies.torch"
    data = pickle.dumps(described(), 2)
    old = f"c{module}\n{name}\n".encode()
    new = {
        "MCoreMetadata": b"ctorch.distributed.checkpoint.metadata\nMetadata\n",
        "MCoreSavePlan": b"ctorch.distributed.checkpoint.planner\nSavePlan\n",
    }[name]
    assert data.count(new) == 1
    (tmp_path / ".metadata").write_bytes(data.replace(new, old))
    assert read_metadata(tmp_path).state_dict_metadata == described().state_dict_metadata
    (tmp_path / ".metadata").write_bytes(data.replace(new, old.replace(b"MCore", b"Score")))
    with pytest.raises(L0MoEError, match=r"asks for megatron.*\.Score"):
        read_metadata(tmp_path)

"""Tiny L0-MoEs out of random dense models, as Megatron checkpoints, with what is done to them in tests."""

import argparse
import shutil
from pathlib import Path

import torch
from conversion.toy_checkpoints import save_model, write_expert_run

from megatron_l0moe.checkpoints.families import MoEShape, extra_states
from megatron_l0moe.checkpoints.torch_dist import CheckpointReader, CheckpointWriter
from megatron_l0moe.conversion.convert import convert_dense
from megatron_l0moe.conversion.export import export_moe
from megatron_l0moe.experts.extraction import extract_expert
from megatron_l0moe.experts.merging import assemble
from megatron_l0moe.sizes.architecture import Architecture

DENSE_LAYERS, EXPERTS, WIDTH, TOP_K = 1, 4, 20, 2


def make_moe(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32) -> list[Path]:
    """Write folder/hf, folder/convert, expert files with other weights each, and folder/assemble; returns the files."""
    convert_dense(save_model(folder / "hf", name, dtype=dtype), folder / "convert")
    files = []
    for k in range(EXPERTS):

        def change(tensor_name, tensor, k=k):
            is_mlp = ".linear_fc" in tensor_name and "norm" not in tensor_name
            return tensor * (1 + 0.1 * k) if is_mlp else tensor

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
    return files


def export(folder: Path, out: str = "export", **changes):
    """Export folder/assemble to folder/out."""
    arguments = {"dense_layers": DENSE_LAYERS, "top_k": TOP_K, **changes}
    return export_moe(folder / "assemble/megatron", folder / "hf", folder / out, **arguments)


def rewrite_megatron(folder: Path, change=lambda name, tensor: tensor, extra=None, **arguments) -> None:
    """Write folder/assemble again with changed or further tensors, or other arguments of Megatron."""
    reader = CheckpointReader(folder / "assemble/megatron")
    args = argparse.Namespace(**{**vars(reader.common["args"]), **arguments})
    with CheckpointWriter(folder / "changed", {**reader.common, "args": args}) as writer:
        for name in reader.model_names():
            writer.write(name, change(name, reader.read(name)))
        for name, tensor in (extra or {}).items():
            writer.write(name, tensor)
        moe = MoEShape(dense_layers=DENSE_LAYERS, num_experts=EXPERTS, expert_ffn=WIDTH, top_k=TOP_K)
        for name, shards in extra_states(Architecture(**reader.settings["architecture"]), moe).items():
            writer.write_empty_state(name, shards)
    shutil.rmtree(folder / "assemble/megatron")
    (folder / "changed").rename(folder / "assemble/megatron")


def assert_same_checkpoint(one: Path, two: Path) -> None:
    """Same tensors bit by bit, same settings, same empty states."""
    a, b = CheckpointReader(one), CheckpointReader(two)
    assert a.shapes == b.shapes
    for name in a.shapes:
        left, right = a.read(name), b.read(name)
        assert left.dtype is right.dtype, name
        assert torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)), name
    assert a._metadata.state_dict_metadata.keys() == b._metadata.state_dict_metadata.keys()

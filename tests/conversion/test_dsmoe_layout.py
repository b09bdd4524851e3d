"""A DSMoE in transformers, by its own modelling file, against Megatron: logits, real skipping, refusals."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch
from conversion.in_megatron import megatron_logits
from conversion.toy_checkpoints import FFN, HIDDEN, LAYERS, STD, VOCAB, save_model
from transformers import AutoModelForCausalLM, dynamic_module_utils

from megatron_l0moe.checkpoints.families import extra_states
from megatron_l0moe.checkpoints.torch_dist import CheckpointReader, CheckpointWriter
from megatron_l0moe.conversion.convert import convert_dense
from megatron_l0moe.conversion.export import export_dense, export_dsmoe
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.sizes.architecture import Architecture

FAMILIES = {"llama": "llama3.1", "llama_tied": "llama-tied", "mistral": "mistral-v0.2", "qwen2": "qwen2"}
DENSE_LAYERS, BLOCKS = 1, 8
SETTINGS = {"stage": "dsmoe", "dense_layers": DENSE_LAYERS, "l0_blocks": BLOCKS, "l0_block_threshold": 0.4}
# two float32 programs that sum in other orders, logits of size 1 (relative to the largest)
FP32_RELATIVE_TOLERANCE = 1e-5
IDS = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))


def make_dsmoe(folder: Path, name: str = "llama") -> Path:
    """Write folder/hf, folder/convert and folder/dsmoe: the dense weights with random gates."""
    convert_dense(save_model(folder / "hf", name), folder / "convert")
    reader = CheckpointReader(folder / "convert/megatron")
    generator = torch.Generator().manual_seed(1)
    with CheckpointWriter(folder / "dsmoe", {**reader.common, "l0moe": SETTINGS}) as writer:
        for tensor in reader.model_names():
            writer.write(tensor, reader.read(tensor))
        for layer in range(DENSE_LAYERS, LAYERS):
            gates = 2 * STD * torch.randn(BLOCKS, HIDDEN, generator=generator)
            writer.write(f"decoder.layers.{layer}.mlp.block_gate.weight", gates)
        for state, shards in extra_states(Architecture.from_hf(folder / "hf"), None).items():
            writer.write_empty_state(state, shards)
    return folder


def load(folder: Path, **changes):
    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **changes
    )


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory):
    """Let transformers put the checkpoints' code into a folder of the test."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("modules")
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        patch.setattr(sys, "path", [*sys.path])
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for family, name in FAMILIES.items():
        folders[family] = make_dsmoe(tmp_path_factory.mktemp(family), name)
        export_dsmoe(folders[family] / "dsmoe", folders[family] / "hf", folders[family] / f"{family}_export")
    return folders


@pytest.fixture(scope="module")
def expected_logits(exported, tmp_path_factory) -> dict[str, torch.Tensor]:
    checkpoints = {family: place / "dsmoe/release" for family, place in exported.items()}
    return megatron_logits(checkpoints, IDS, tmp_path_factory.mktemp("logits"))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_transformers_computes_megatrons_logits(exported, expected_logits, family):
    model, loading = load(exported[family] / f"{family}_export")
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == "DSMoEForCausalLM"
    assert type(model).__mro__[1].__name__.lower().startswith(family.split("_")[0])
    expected = expected_logits[family]
    tolerance = FP32_RELATIVE_TOLERANCE * expected.abs().max()
    assert (model(IDS).logits - expected).abs().max() < tolerance
    by_steps = model(IDS[:, :-1], use_cache=True)  # a step of decoding, whose tokens go alone
    last = model(IDS[:, -1:], past_key_values=by_steps.past_key_values).logits
    assert (last - expected[:, -1:]).abs().max() < tolerance
    model.config.block_threshold = 0.5  # control
    assert (model(IDS).logits - expected).abs().max() > 100 * tolerance


@torch.no_grad()
def test_closed_blocks_are_not_computed(exported):
    model, _ = load(exported["llama"] / "llama_export")
    mlp = model.model.layers[-1].mlp
    token = torch.randn(1, 1, HIDDEN, generator=torch.Generator().manual_seed(3))
    is_open = mlp.factors(token[0])[0] > 0
    assert 1 <= is_open.sum() < BLOCKS
    expected, width = mlp(token), FFN // BLOCKS
    for block in (~is_open).nonzero().flatten().tolist():
        channels = slice(block * width, (block + 1) * width)
        for tensor in (mlp.gate_proj.weight[channels], mlp.down_proj.weight[:, channels]):
            tensor.fill_(torch.nan)
    assert torch.equal(mlp(token), expected)
    mlp.up_proj.weight[int(is_open.nonzero()[0]) * width].fill_(torch.nan)  # control: an open block
    assert mlp(token).isnan().any()


def test_a_token_without_an_open_block_uses_the_highest(exported):
    model, _ = load(exported["llama"] / "llama_export", block_threshold=0.999)
    tokens = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(3))
    factors = model.model.layers[-1].mlp.factors(tokens)
    scores = torch.sigmoid(tokens @ model.model.layers[-1].mlp.block_gate.weight.T)
    assert torch.equal((factors > 0).sum(-1), torch.ones(9, dtype=torch.long))
    assert torch.allclose(factors.max(-1).values, BLOCKS * scores.max(-1).values)


def test_training_it_in_transformers_is_refused(exported):
    model, _ = load(exported["llama"] / "llama_export")
    with pytest.raises(RuntimeError, match="for inference"):
        model.train()(IDS)


def test_files_of_the_export(exported):
    folder = exported["qwen2"] / "qwen2_export"
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "dsmoe_qwen2"
    assert (config["num_blocks"], config["num_dense_layers"], config["block_threshold"]) == (8, 1, 0.4)
    tree = ast.parse((folder / "modeling_dsmoe.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"torch", "transformers", "transformers.models.qwen2.modeling_qwen2"}
    card = (folder / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert "8 of 6 units" in card
    assert "vLLM and SGLang do not know it" in card


def test_checkpoints_of_other_stages_are_refused(exported, tmp_path):
    place = exported["llama"]
    with pytest.raises(L0MoEError, match="is of the stage 'dense' and has no blocks"):
        export_dsmoe(place / "convert/megatron", place / "hf", tmp_path / "out")
    with pytest.raises(L0MoEError, match=r"holds the tensor decoder\.layers\.1\.mlp\.block_gate\.weight"):
        export_dense(place / "dsmoe", place / "hf", tmp_path / "out")

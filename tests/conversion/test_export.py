"""The exported L0-MoE loads with plain transformers and computes what the independent reference computes."""

import json
import shutil

import pytest
import torch
from conversion.reference import MoELayer, forward
from conversion.toy_checkpoints import (
    HEAD_DIM,
    LAYERS,
    VOCAB,
    save_model,
    sizes_of,
    state_of,
    write_expert_run,
)
from transformers import AutoModelForCausalLM, Ernie4_5_MoeForCausalLM

from megatron_l0moe.conversion.architecture import Architecture
from megatron_l0moe.conversion.convert import convert_dense
from megatron_l0moe.conversion.export import export_dense, export_moe
from megatron_l0moe.conversion.families import MoEShape, ernie_moe_rules
from megatron_l0moe.conversion.mapping import interleaved_rows
from megatron_l0moe.conversion.megatron_checkpoint import CheckpointReader, CheckpointWriter
from megatron_l0moe.conversion.safetensors_files import SafetensorsFolder
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.experts.expert_file import ExpertFile
from megatron_l0moe.experts.extraction import extract_expert
from megatron_l0moe.experts.merging import assemble

# float32 transformers against a float64 reference, logits of size 1 (relative 1e-5 of the largest)
FP32_RELATIVE_TOLERANCE = 1e-5
DENSE_LAYERS, EXPERTS, WIDTH, TOP_K = 1, 4, 20, 2


def make(folder, name="llama", dtype=torch.float32):
    """Dense model, experts with different weights, assembled and exported checkpoints in `folder`."""
    convert_dense(save_model(folder / "hf", name, dtype=dtype), folder / "convert")
    files = []
    for k in range(EXPERTS):

        def change(tensor_name, tensor, k=k):
            is_mlp = ".linear_fc" in tensor_name and "norm" not in tensor_name
            return tensor * (1 + 0.1 * k) if is_mlp else tensor

        run = write_expert_run(
            folder / f"run{k}", folder / "convert/megatron", dense_layers=DENSE_LAYERS, seed=k, change=change
        )
        files.append(folder / f"expert{k}.safetensors")
        extract_expert(run, files[-1], width=WIDTH)
    assemble(folder / "convert/megatron", files, folder / "assemble", top_k=TOP_K)
    return files


def export(folder, **changes):
    arguments = {"dense_layers": DENSE_LAYERS, "top_k": TOP_K, **changes}
    return export_moe(folder / "assemble/megatron", folder / "hf", folder / "export", **arguments)


@pytest.fixture(scope="module", params=["llama", "llama-tied", "llama3.1", "mistral"])
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    files = make(folder, request.param)
    return folder, files, export(folder)


def reference_logits(folder, files, ids, top_k=TOP_K, order=("gate", "up", "down")):
    reader = CheckpointReader(folder / "assemble/megatron")
    experts = [ExpertFile(file) for file in files]
    moe = {
        layer: MoELayer(
            router=reader.read(f"decoder.layers.{layer}.mlp.router.weight"),
            experts=[tuple(expert.read(layer, part) for part in order) for expert in experts],
            top_k=top_k,
        )
        for layer in range(DENSE_LAYERS, LAYERS)
    }
    return forward(state_of(folder / "hf"), sizes_of(folder / "hf"), ids, moe)


def test_transformers_computes_the_reference_logits(exported):
    folder, files, _ = exported
    model, loading = AutoModelForCausalLM.from_pretrained(folder / "export", output_loading_info=True)
    assert isinstance(model, Ernie4_5_MoeForCausalLM)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = model(ids).logits.double()
    expected = reference_logits(folder, files, ids)
    tolerance = FP32_RELATIVE_TOLERANCE * expected.abs().max()
    assert (got - expected).abs().max() < tolerance
    for control in ({"top_k": 1}, {"order": ("up", "gate", "down")}):
        assert (got - reference_logits(folder, files, ids, **control)).abs().max() > 100 * tolerance


def test_config_is_in_the_4_57_form_with_explicit_ties(exported):
    folder, _, result = exported
    config = json.loads((folder / "export/config.json").read_text())
    source = json.loads((folder / "hf/config.json").read_text())
    assert config["architectures"] == ["Ernie4_5_MoeForCausalLM"]
    assert config["rope_theta"] == source["rope_parameters"]["rope_theta"]
    assert "rope_parameters" not in config
    assert config["tie_word_embeddings"] is source["tie_word_embeddings"]
    assert config["moe_num_shared_experts"] == 0
    assert (config["moe_layer_start_index"], config["moe_k"]) == (DENSE_LAYERS, TOP_K)
    assert (config["moe_num_experts"], config["moe_intermediate_size"]) == (EXPERTS, WIDTH)
    assert "auto_map" not in config
    assert (result["num_experts"], result["expert_ffn"]) == (EXPERTS, WIDTH)


def test_control_rows_of_q_are_reordered_and_biases_zero(exported):
    folder, _, _ = exported
    tensors, source = SafetensorsFolder(folder / "export"), SafetensorsFolder(folder / "hf")
    for n in "qk":
        name = f"model.layers.0.self_attn.{n}_proj.weight"
        assert torch.equal(tensors.read(name), interleaved_rows(source.read(name), HEAD_DIM))
        assert not torch.equal(tensors.read(name), source.read(name))
    bias = tensors.read(f"model.layers.{DENSE_LAYERS}.mlp.moe_statics.e_score_correction_bias")
    assert bias.dtype is torch.float32
    assert not bias.any()


def test_the_rules_also_import_the_export(exported):
    """HF -> Megatron by the same table gives the assembled checkpoint again."""
    folder, _, _ = exported
    tensors, megatron = SafetensorsFolder(folder / "export"), CheckpointReader(folder / "assemble/megatron")
    moe = MoEShape(dense_layers=DENSE_LAYERS, num_experts=EXPERTS, expert_ffn=WIDTH, top_k=TOP_K)
    seen = set()
    for rule in ernie_moe_rules(Architecture.from_hf(folder / "hf"), moe):
        for piece in rule.to_megatron(tensors.read):
            seen.add(piece.name)
            assert torch.equal(piece.tensor, megatron.read(piece.name, piece.row)), piece.name
    assert seen == megatron.model_names()


def test_bfloat16_stays_and_the_router_is_float32(tmp_path):
    make(tmp_path, dtype=torch.bfloat16)
    assert export(tmp_path)["dtype"] == "bfloat16"
    tensors = SafetensorsFolder(tmp_path / "export")
    assert tensors.read("model.layers.2.mlp.gate.weight").dtype is torch.float32
    assert tensors.read("model.layers.2.mlp.experts.3.up_proj.weight").dtype is torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto")
    assert model.dtype is torch.bfloat16
    assert model.model.layers[2].mlp.gate.weight.dtype is torch.float32


def test_tokenizer_files_are_copied(tmp_path):
    make(tmp_path)
    (tmp_path / "hf/tokenizer.json").write_text("{}")
    (tmp_path / "hf/secret.txt").write_text("not this")
    export(tmp_path)
    assert (tmp_path / "export/tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "export/secret.txt").exists()
    assert not list((tmp_path / "export").glob(".*"))


def test_counters_of_training_are_left_out(tmp_path):
    make(tmp_path)
    rewrite_megatron(tmp_path, extra={"decoder.layers.1.mlp.router.expert_load.load": torch.ones(EXPERTS)})
    export(tmp_path)


def rewrite_megatron(folder, change=lambda name, tensor: tensor, extra=None):
    reader = CheckpointReader(folder / "assemble/megatron")
    with CheckpointWriter(folder / "changed", reader.common) as writer:
        for name in reader.model_names():
            writer.write(name, change(name, reader.read(name)))
        for name, tensor in (extra or {}).items():
            writer.write(name, tensor)
    shutil.rmtree(folder / "assemble/megatron")
    (folder / "changed").rename(folder / "assemble/megatron")


def nan_in_the_last_expert(name, tensor):
    if name == "decoder.layers.2.mlp.experts.experts.linear_fc2.weight":
        tensor[-1, -1, -1] = torch.nan
    return tensor


def test_nan_weights_are_refused_and_nothing_is_left(tmp_path):
    make(tmp_path)
    rewrite_megatron(tmp_path, nan_in_the_last_expert)
    with pytest.raises(
        L0MoEError, match=r"model\.layers\.2\.mlp\.experts\.3\.down_proj\.weight holds 1 values"
    ):
        export(tmp_path)
    assert not list((tmp_path / "export").iterdir())


def test_unknown_megatron_tensors_are_refused(tmp_path):
    make(tmp_path)
    rewrite_megatron(tmp_path, extra={"decoder.layers.1.mlp.shared.weight": torch.ones(1)})
    with pytest.raises(L0MoEError, match=r"holds the tensor decoder\.layers\.1\.mlp\.shared\.weight"):
        export(tmp_path)


WRONG_SETTINGS = {
    "dense layers": ({"dense_layers": 0}, r"no experts in layer 0 .*check dense_layers \(0\)"),
    "too few": ({"dense_layers": 2}, r"holds the tensor decoder\.layers\.1\.mlp"),
    "too many": ({"dense_layers": 3}, r"dense_layers \(3\) must be at least 0 and below the 3 layers"),
    "top_k": ({"top_k": 5}, r"top_k \(5\) must be between 1 and the number of experts \(4\)"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG_SETTINGS.values(), ids=WRONG_SETTINGS.keys())
def test_wrong_settings_are_refused(exported, tmp_path, changes, message):
    folder, _, _ = exported
    arguments = {"dense_layers": DENSE_LAYERS, "top_k": TOP_K, **changes}
    with pytest.raises(L0MoEError, match=message):
        export_moe(folder / "assemble/megatron", folder / "hf", tmp_path / "export", **arguments)


def test_a_qkv_bias_and_a_dense_checkpoint_are_refused(exported, tmp_path):
    folder, _, _ = exported
    qwen2 = save_model(tmp_path / "qwen2", "qwen2")
    with pytest.raises(L0MoEError, match="qwen2 model with q/k/v biases"):
        export_moe(folder / "assemble/megatron", qwen2, tmp_path / "export", dense_layers=1, top_k=2)
    with pytest.raises(L0MoEError, match="no experts in layer 1"):
        export_moe(folder / "convert/megatron", folder / "hf", tmp_path / "export", dense_layers=1, top_k=2)
    with pytest.raises(L0MoEError, match="holds the tensor"):
        export_dense(folder / "assemble/megatron", folder / "hf", tmp_path / "export")

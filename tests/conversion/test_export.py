"""The exported L0-MoE loads with plain transformers and computes what the independent reference computes."""

import json

import pytest
import torch
from conversion.reference import MoELayer, forward
from conversion.toy_checkpoints import HEAD_DIM, LAYERS, VOCAB, save_tokenizer, sizes_of, state_of
from conversion.toy_moe import DENSE_LAYERS, EXPERTS, TOP_K, WIDTH, export, make_moe, rewrite_megatron
from transformers import AutoModelForCausalLM, Ernie4_5_MoeForCausalLM

from megatron_l0moe.checkpoints.rules import interleaved_rows
from megatron_l0moe.checkpoints.safetensors_files import SafetensorsFolder
from megatron_l0moe.checkpoints.torch_dist import CheckpointReader
from megatron_l0moe.conversion.export import export_dense, export_moe
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.experts.expert_file import ExpertFile

# float32 transformers against a float64 reference, logits of size 1 (relative 1e-5 of the largest)
FP32_RELATIVE_TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=["llama", "llama-tied", "llama3.1", "mistral"])
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    files = make_moe(folder, request.param)
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


def test_bfloat16_stays_and_the_router_is_float32(tmp_path):
    make_moe(tmp_path, dtype=torch.bfloat16)
    assert export(tmp_path)["dtype"] == "bfloat16"
    tensors = SafetensorsFolder(tmp_path / "export")
    assert tensors.read("model.layers.2.mlp.gate.weight").dtype is torch.float32
    assert tensors.read("model.layers.2.mlp.experts.3.up_proj.weight").dtype is torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto")
    assert model.dtype is torch.bfloat16
    assert model.model.layers[2].mlp.gate.weight.dtype is torch.float32


def test_tokenizer_files_are_tried_and_copied(tmp_path):
    make_moe(tmp_path)
    save_tokenizer(tmp_path / "hf")
    (tmp_path / "hf/secret.txt").write_text("not this")
    export(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "export" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    assert not (tmp_path / "export/secret.txt").exists()
    assert not list((tmp_path / "export").glob(".*"))


def test_a_damaged_tokenizer_of_the_base_ends_the_export_before_it_begins(tmp_path):
    make_moe(tmp_path)
    file = save_tokenizer(tmp_path / "hf") / "tokenizer.json"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(L0MoEError, match=r"The tokenizer in .*hf cannot be used \("):
        export(tmp_path)
    assert not (tmp_path / "export").exists()


def test_counters_of_training_are_left_out(tmp_path):
    make_moe(tmp_path)
    rewrite_megatron(tmp_path, extra={"decoder.layers.1.mlp.router.expert_load.load": torch.ones(EXPERTS)})
    export(tmp_path)


def nan_in_the_last_expert(name, tensor):
    if name == "decoder.layers.2.mlp.experts.experts.linear_fc2.weight":
        tensor[-1, -1, -1] = torch.nan
    return tensor


def test_nan_weights_are_refused_and_nothing_is_left(tmp_path):
    make_moe(tmp_path)
    rewrite_megatron(tmp_path, nan_in_the_last_expert)
    with pytest.raises(
        L0MoEError, match=r"model\.layers\.2\.mlp\.experts\.3\.down_proj\.weight holds 1 values"
    ):
        export(tmp_path)
    assert not list((tmp_path / "export").iterdir())


def test_unknown_megatron_tensors_are_refused(tmp_path):
    make_moe(tmp_path)
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


def test_a_dense_checkpoint_is_no_moe_and_the_other_way_round(exported, tmp_path):
    folder, _, _ = exported
    with pytest.raises(L0MoEError, match="no experts in layer 1"):
        export_moe(folder / "convert/megatron", folder / "hf", tmp_path / "export", dense_layers=1, top_k=2)
    with pytest.raises(L0MoEError, match="holds the tensor"):
        export_dense(folder / "assemble/megatron", folder / "hf", tmp_path / "export")


WRONG_ARGUMENTS = {
    "base": ({"rotary_base": 77}, r"made with rotary_base = 77, but the base model has 10000\.0"),
    "norm": ({"norm_epsilon": 1e-6}, "made with norm_epsilon = 1e-06"),
    "norm of a trained one": ({"layernorm_epsilon": 1e-6}, "made with layernorm_epsilon = 1e-06"),
    "heads": ({"num_attention_heads": 2}, "made with num_attention_heads = 2, but the base model has 4"),
    "top_k": ({"moe_router_topk": 1}, "trained with moe_router_topk = 1, but only 2"),
    "score": ({"moe_router_score_function": "sigmoid"}, "moe_router_score_function = sigmoid"),
    "scale": ({"moe_router_topk_scaling_factor": 2.5}, "moe_router_topk_scaling_factor = 2.5"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS.keys())
def test_what_shapes_do_not_tell_is_compared(tmp_path, arguments, message):
    make_moe(tmp_path)
    rewrite_megatron(tmp_path, **arguments)
    with pytest.raises(L0MoEError, match=message):
        export(tmp_path)
    assert not (tmp_path / "export").exists()


def padded(name, tensor):
    vocabulary = name in ("embedding.word_embeddings.weight", "output_layer.weight")
    return torch.nn.functional.pad(tensor, (0, 0, 0, 64), value=7.0) if vocabulary else tensor


def test_padding_of_the_vocabulary_is_dropped(tmp_path):
    make_moe(tmp_path)
    export(tmp_path, "good")
    rewrite_megatron(tmp_path, padded)
    export(tmp_path)
    good, other = SafetensorsFolder(tmp_path / "good"), SafetensorsFolder(tmp_path / "export")
    assert all(torch.equal(good.read(name), other.read(name)) for name in good.names)


def test_a_failed_export_leaves_the_last_good_one_as_it_was(tmp_path):
    make_moe(tmp_path, "qwen2")
    export(tmp_path)
    before = {file: file.read_bytes() for file in (tmp_path / "export").rglob("*") if file.is_file()}
    rewrite_megatron(tmp_path, nan_in_the_last_expert)
    for target in ("all", "transformers"):
        with pytest.raises(L0MoEError, match="already holds a checkpoint"):
            export(tmp_path, target=target)
    (tmp_path / "export/config.json").unlink()
    with pytest.raises(L0MoEError, match="already holds a checkpoint"):
        export(tmp_path)
    del before[tmp_path / "export/config.json"]
    assert before == {file: file.read_bytes() for file in before}
    assert {file for file in (tmp_path / "export").rglob("*") if file.is_file()} == before.keys()


def test_two_layouts_lie_in_two_folders(tmp_path):
    make_moe(tmp_path, "qwen2")
    result = export(tmp_path)
    assert result["folders"] == {
        ".": {"form": "qwen2_moe", "engines": ["transformers", "vllm"]},
        "sglang": {"form": "ernie4_5_moe_bias", "engines": ["sglang"]},
    }
    for folder, name in (("export", "Qwen2MoeForCausalLM"), ("export/sglang", "Ernie4_5_MoeForCausalLM")):
        assert json.loads((tmp_path / folder / "config.json").read_text())["architectures"] == [name]
    assert "sglang" in (tmp_path / "export/sglang/README.md").read_text()


def test_what_sglang_loads(tmp_path):
    """Its Ernie4.5-MoE stops at a name it does not know, and has q, k, v and o biases and no others."""
    make_moe(tmp_path, "qwen2")
    export(tmp_path, target="sglang")
    tensors = SafetensorsFolder(tmp_path / "export")
    biases = {name for name in tensors.names if name.endswith(".bias")}
    assert biases == {f"model.layers.{i}.self_attn.{n}_proj.bias" for i in range(LAYERS) for n in "qkvo"}
    assert json.loads((tmp_path / "export/config.json").read_text())["use_bias"] is True
    assert not tensors.read("model.layers.0.self_attn.o_proj.bias").any()
    source = SafetensorsFolder(tmp_path / "hf").read("model.layers.0.self_attn.q_proj.bias")
    head_dim = source.numel() // 4
    written = tensors.read("model.layers.0.self_attn.q_proj.bias")
    assert torch.equal(written, interleaved_rows(source, head_dim))
    assert not torch.equal(written, source)


def test_what_vllm_loads(tmp_path):
    """Its Qwen2-MoE always has q, k, v biases, and stops at a shared expert of width 0."""
    make_moe(tmp_path, "llama-square")
    rewrite_megatron(tmp_path, moe_router_pre_softmax=True)
    export(tmp_path, target="vllm")
    tensors = SafetensorsFolder(tmp_path / "export")
    for n in "qkv":
        assert not tensors.read(f"model.layers.0.self_attn.{n}_proj.bias").any()
    assert not [name for name in tensors.names if ".shared_expert." in name]
    assert not tensors.read("model.layers.1.mlp.shared_expert_gate.weight").any()
    assert "model.layers.0.mlp.shared_expert_gate.weight" not in tensors.names

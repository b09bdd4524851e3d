"""An exported L0-MoE comes back as the checkpoint it was made from, and what is not one is refused."""

import json

import pytest
import torch
from conversion.toy_checkpoints import save_model
from conversion.toy_moe import assert_same_checkpoint, export, make_moe, rewrite_megatron
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_l0moe.checkpoints.torch_dist import CheckpointReader
from megatron_l0moe.conversion.convert import convert_any, convert_dense, convert_moe
from megatron_l0moe.errors import L0MoEError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_every_layout_comes_back_bit_by_bit_with_its_settings(tmp_path, name, dtype):
    make_moe(tmp_path, name, dtype)
    megatron = tmp_path / "assemble/megatron"
    for folder in export(tmp_path)["folders"]:
        out = tmp_path / f"again {folder}"
        result = convert_any(tmp_path / "export" / folder, out)
        assert (result["num_experts"], result["dense_layers"]) == (4, 1)
        assert_same_checkpoint(megatron, out / "megatron")
        before, after = CheckpointReader(megatron), CheckpointReader(out / "megatron")
        assert {**before.settings, "router_init": ""} == {**after.settings, "router_init": ""}
        assert before.common["args"] == after.common["args"]


def test_a_changed_bit_is_seen(tmp_path):
    """Control of the comparison above."""
    make_moe(tmp_path)
    export(tmp_path)
    change(tmp_path / "export", "model.layers.2.mlp.experts.3.down_proj.weight", lambda x: x * (1 + 1e-6))
    convert_moe(tmp_path / "export", tmp_path / "again")
    with pytest.raises(AssertionError):
        assert_same_checkpoint(tmp_path / "assemble/megatron", tmp_path / "again/megatron")


def test_gate_weights_that_are_not_renormalised_come_back_so(tmp_path):
    make_moe(tmp_path, "qwen2")
    rewrite_megatron(tmp_path, moe_router_pre_softmax=True)
    export(tmp_path, target="transformers")
    convert_moe(tmp_path / "export", tmp_path / "again")
    assert CheckpointReader(tmp_path / "again/megatron").common["args"].moe_router_pre_softmax is True


@pytest.mark.parametrize(("name", "form"), [("llama", "Ernie4_5_Moe"), ("qwen2", "Qwen2Moe")])
def test_what_transformers_saved_again_comes_back(tmp_path, name, form):
    """With zero-width tensors of a shared expert in Qwen2-MoE, and RoPE in the form of transformers 5."""
    make_moe(tmp_path, name)
    export(tmp_path, target="transformers")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(tmp_path / "tuned")
    saved = load_file(tmp_path / "tuned/model.safetensors")
    empty = [key for key, tensor in saved.items() if tensor.numel() == 0]
    assert type(model).__name__.startswith(form)
    assert len(empty) == (6 if form == "Qwen2Moe" else 0)
    convert_moe(tmp_path / "tuned", tmp_path / "again")
    before, after = (CheckpointReader(tmp_path / part / "megatron") for part in ("assemble", "again"))
    for key in before.model_names():
        factor = 2 if key == "decoder.final_layernorm.weight" else 1
        assert torch.equal(factor * before.read(key), after.read(key)), key
    if empty:
        change(tmp_path / "tuned", empty[0], lambda x: torch.zeros(8, 32))
        with pytest.raises(L0MoEError, match=rf"holds the tensor {empty[0]}, which"):
            convert_moe(tmp_path / "tuned", tmp_path / "no")


def change(folder, name, function):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = function(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def configure(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """folder/ernie4_5_moe and folder/qwen2_moe, out of one Llama."""
    folder = tmp_path_factory.mktemp("exported")
    make_moe(folder, "llama-square")
    export(folder, "ernie4_5_moe")
    rewrite_megatron(folder, moe_router_pre_softmax=True)
    export(folder, "qwen2_moe", target="vllm")
    return folder


BAD_CONFIGS = {
    "shared experts": ("ernie4_5_moe", {"moe_num_shared_experts": 2}, "moe_num_shared_experts must be 0"),
    "interval": (
        "ernie4_5_moe",
        {"moe_layer_interval": 2},
        "moe_layer_interval must be 1 in an L0-MoE, got 2",
    ),
    "bias": ("ernie4_5_moe", {"use_bias": True}, "use_bias must be False"),
    "no k": ("ernie4_5_moe", {"moe_k": None}, "moe_k must be a whole number above 0, got None"),
    "ties": (
        "ernie4_5_moe",
        {"tie_word_embeddings": None},
        "tie_word_embeddings must be False in an L0-MoE, got None",
    ),
    "family": (
        "ernie4_5_moe",
        {"l0moe_base_family": "gemma"},
        "l0moe_base_family is 'gemma', but must be one of",
    ),
    "rope": ("ernie4_5_moe", {"rope_scaling": {"type": "yarn"}}, "type 'yarn' is not supported"),
    "shared expert": (
        "qwen2_moe",
        {"shared_expert_intermediate_size": 8},
        "shared_expert_intermediate_size must be 0 in an L0-MoE, got 8",
    ),
    "upper dense layer": ("qwen2_moe", {"mlp_only_layers": [2]}, r"mlp_only_layers must be \[0\]"),
    "another model": (
        "qwen2_moe",
        {"architectures": ["Qwen3MoeForCausalLM"]},
        "Qwen3MoeForCausalLM, not an L0-MoE",
    ),
    "endless experts": ("ernie4_5_moe", {"moe_num_experts": 10**12}, "moe_num_experts must be at most 65536"),
    "k text": ("ernie4_5_moe", {"moe_k": "two"}, "moe_k must be a whole number above 0, got two"),
    "experts": ("qwen2_moe", {"num_experts": 5}, r"lacks the tensor model\.layers\.1\.mlp\.experts\.4"),
}


@pytest.mark.parametrize(("form", "values", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_configs_of_other_models_are_refused(exported, tmp_path, form, values, message):
    copy(exported / form, tmp_path / "hf")
    configure(tmp_path / "hf", **values)
    with pytest.raises(L0MoEError, match=message):
        convert_moe(tmp_path / "hf", tmp_path / "out")
    assert not list(tmp_path.glob("out/megatron/*"))


def copy(source, target):
    target.mkdir()
    for name in ("config.json", "model.safetensors"):
        (target / name).write_bytes((source / name).read_bytes())


BAD_TENSORS = {
    "correction": ("ernie4_5_moe", "model.layers.1.mlp.moe_statics.e_score_correction_bias"),
    "shared expert gate": ("qwen2_moe", "model.layers.1.mlp.shared_expert_gate.weight"),
    "bias that Llama lacks": ("qwen2_moe", "model.layers.0.self_attn.k_proj.bias"),
}


@pytest.mark.parametrize(("form", "name"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_what_megatron_has_no_place_for_must_be_zero(exported, tmp_path, form, name):
    copy(exported / form, tmp_path / "hf")
    convert_moe(tmp_path / "hf", tmp_path / "good")  # control
    change(tmp_path / "hf", name, lambda x: x + 1)
    with pytest.raises(L0MoEError, match=f"{name} must be all zeros"):
        convert_moe(tmp_path / "hf", tmp_path / "out")
    assert not list(tmp_path.glob("out/megatron/*"))


def test_a_nan_in_one_expert_stops(exported, tmp_path):
    copy(exported / "qwen2_moe", tmp_path / "hf")
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    change(tmp_path / "hf", name, lambda x: x.index_fill(0, torch.tensor([1]), torch.nan))
    with pytest.raises(L0MoEError, match=f"{name} holds 32 values that are NaN"):
        convert_moe(tmp_path / "hf", tmp_path / "out")


def test_one_expert_of_another_dtype_stops(exported, tmp_path):
    copy(exported / "ernie4_5_moe", tmp_path / "hf")
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    change(tmp_path / "hf", name, lambda x: x.bfloat16())
    with pytest.raises(L0MoEError, match=f"{name} is torch.bfloat16, but model.layers.2.mlp.experts.0"):
        convert_moe(tmp_path / "hf", tmp_path / "out")


def test_dense_and_moe_are_told_apart(exported, tmp_path):
    dense = save_model(tmp_path / "dense")
    assert "num_experts" not in convert_any(dense, tmp_path / "one")
    with pytest.raises(
        L0MoEError, match="LlamaForCausalLM, not an L0-MoE; those are Ernie4_5_MoeForCausalLM"
    ):
        convert_moe(dense, tmp_path / "two")
    with pytest.raises(
        L0MoEError, match=r"Qwen2MoeForCausalLM, which is not supported.*an L0-MoE that this program"
    ):
        convert_dense(exported / "qwen2_moe", tmp_path / "three")

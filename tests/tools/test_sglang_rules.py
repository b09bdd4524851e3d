"""Exports against SGLang's own loading rules, as its released sources have them; every fault is seen."""

import json

import pytest
from conversion.toy_moe import DENSE_LAYERS, EXPERTS, export, make_moe
from sglang_rules import destination, sglang_problems

from megatron_l0moe.checkpoints.safetensors_files import SafetensorsFolder

FIRST = f"model.layers.{DENSE_LAYERS}"


@pytest.fixture(scope="module", params=["llama", "llama-tied", "qwen2"])
def exported(request, tmp_path_factory):
    """The export for SGLang of a family: config.json and the shapes of the tensors."""
    folder = tmp_path_factory.mktemp(request.param)
    make_moe(folder, request.param)
    export(folder, target="sglang")
    tensors = SafetensorsFolder(folder / "export")
    config = json.loads((folder / "export/config.json").read_text())
    return config, {name: tensors.shape(name) for name in tensors.names}


def test_every_tensor_has_a_place_and_every_parameter_is_filled(exported):
    assert sglang_problems(*exported) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c, s: s.pop(f"{FIRST}.mlp.gate.weight"), f"{FIRST}.mlp.gate.weight stays unset"),
        (
            lambda c, s: s.pop(f"{FIRST}.mlp.experts.{EXPERTS - 1}.up_proj.weight"),
            f"{FIRST}.mlp.experts.w13_weight[{EXPERTS - 1}, up] stays unset",
        ),
        (
            lambda c, s: s.pop(f"{FIRST}.mlp.moe_statics.e_score_correction_bias"),
            f"{FIRST}.mlp.gate.e_score_correction_bias stays unset",
        ),
        (lambda c, s: s.update({"model.x.weight": (1,)}), "model.x.weight ends the loading with KeyError"),
        (lambda c, s: s.update({"model.mtp_x.weight": (1,)}), "model.mtp_x.weight is dropped"),
        (
            lambda c, s: s.update({f"{FIRST}.mlp.experts.{EXPERTS}.up_proj.weight": (1, 1)}),
            f"{FIRST}.mlp.experts.{EXPERTS}.up_proj.weight ends the loading with KeyError",
        ),
        (lambda c, s: s.update({"model.norm.weight": (3,)}), "model.norm.weight has the shape [3]"),
        (lambda c, s: c.update(moe_layer_start_index=DENSE_LAYERS + 1), "stays unset"),
        (lambda c, s: c.update(tie_word_embeddings=not c["tie_word_embeddings"]), "lm_head.weight"),
        (lambda c, s: c.update(use_bias=not c["use_bias"]), "bias"),
        (lambda c, s: c.pop("moe_layer_end_index"), "moe_layer_end_index is missing"),
        (lambda c, s: c.update(head_dim=None), "head_dim is None"),
        (lambda c, s: c.update(hidden_act="gelu"), "only silu"),
        (lambda c, s: c.update(rope_is_neox_style=True), "neighbour pairs"),
        (lambda c, s: c.update(moe_num_shared_experts=1), "no shared experts"),
        (lambda c, s: c.update(architectures=["Qwen2MoeForCausalLM"]), "these rules are of"),
    ],
)
def test_control_faults_are_seen(exported, change, problem):
    config, shapes = dict(exported[0]), dict(exported[1])
    change(config, shapes)
    assert any(problem in found for found in sglang_problems(config, shapes))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.k_proj.bias", "model.layers.0.self_attn.qkv_proj.bias[k]"),
        ("model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.o_proj.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_up_proj.weight[up]"),
        ("model.layers.3.mlp.gate.weight", "model.layers.3.mlp.gate.weight"),
        ("model.layers.3.mlp.experts.7.down_proj.weight", "model.layers.3.mlp.experts.w2_weight[7, down]"),
        (
            "model.layers.3.mlp.moe_statics.e_score_correction_bias",
            "model.layers.3.mlp.gate.e_score_correction_bias",
        ),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_places_by_hand(name, expected):
    assert destination(name, tied=False) == expected
    assert destination("lm_head.weight", tied=True) is None

"""Every engine x family x renormalisation gets the layout that it computes rightly, or a refusal that says why."""

import subprocess
import sys

import pytest

from megatron_l0moe.conversion import targets
from megatron_l0moe.conversion.targets import ENGINES, FORMS, Model, Planned, plan
from megatron_l0moe.errors import L0MoEError

LLAMA, QWEN2 = Model(qkv_bias=False), Model(qkv_bias=True)
LLAMA_PLAIN, QWEN2_PLAIN = (Model(qkv_bias=bias, renormalised=False) for bias in (False, True))

CHOSEN = {
    ("transformers", LLAMA): "ernie4_5_moe",
    ("transformers", LLAMA_PLAIN): "qwen2_moe",
    ("transformers", QWEN2): "qwen2_moe",
    ("transformers", QWEN2_PLAIN): "qwen2_moe",
    ("vllm", LLAMA): "ernie4_5_moe",
    ("vllm", LLAMA_PLAIN): "qwen2_moe",
    ("vllm", QWEN2): "qwen2_moe",
    ("vllm", QWEN2_PLAIN): "qwen2_moe",
    ("sglang", LLAMA): "ernie4_5_moe",
    ("sglang", QWEN2): "ernie4_5_moe_bias",
}


@pytest.mark.parametrize(("engine", "model"), CHOSEN, ids=str)
def test_the_layout_of_each_engine(engine, model):
    assert plan(engine, model) == (Planned(form=CHOSEN[engine, model], engines=(engine,), folder=""),)


@pytest.mark.parametrize("model", [LLAMA_PLAIN, QWEN2_PLAIN], ids=str)
@pytest.mark.parametrize("target", ["sglang", "all"])
def test_sglang_cannot_leave_weights_as_they_are(target, model):
    with pytest.raises(
        L0MoEError, match=r"exported for sglang: Ernie4\.5-MoE .*always makes.*ignores mlp_only_layers"
    ):
        plan(target, model)


def test_the_refusal_names_the_engines_that_are_left():
    with pytest.raises(
        L0MoEError, match=r"k, v: no; .*renormalised: no\).*; export for transformers or vllm\.$"
    ):
        plan("sglang", LLAMA_PLAIN)


def test_all_is_one_folder_if_one_layout_serves_all_and_else_one_per_layout():
    assert plan("all", LLAMA) == (Planned(form="ernie4_5_moe", engines=ENGINES, folder=""),)
    assert plan("all", QWEN2) == (
        Planned(form="qwen2_moe", engines=("transformers", "vllm"), folder=""),
        Planned(form="ernie4_5_moe_bias", engines=("sglang",), folder="sglang"),
    )


def test_an_unusual_head_dim_is_refused_where_vllm_ignores_it():
    unusual = Model(qkv_bias=True, usual_head_dim=False)
    with pytest.raises(L0MoEError, match="takes hidden_size / num_attention_heads for head_dim"):
        plan("vllm", unusual)
    assert plan("transformers", unusual)[0].form == "qwen2_moe"
    assert plan("vllm", Model(qkv_bias=False, usual_head_dim=False))[0].form == "ernie4_5_moe"


def test_every_fault_of_an_engine_keeps_its_layout_from_being_chosen():
    for (engine, form), reason in targets.WRONG.items():
        spec = next(spec for spec in FORMS if spec.name == form)
        model = Model(qkv_bias=next(iter(spec.qkv_bias)), renormalised=next(iter(spec.renormalised)))
        assert targets.refusal(engine, spec, model) == reason
        others = [other for other in ENGINES if (other, form) not in targets.WRONG]
        assert any(targets.refusal(other, spec, model) is None for other in others)  # control


def test_no_torch_is_imported():
    code = "import sys, megatron_l0moe.conversion.targets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

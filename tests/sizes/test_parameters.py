"""Parameter counts against real (tiny) transformers models, the paper's sizes, and bounds worked by hand.

Parameters of exports by method, against the weights that transformers makes of their config.json.
"""

import random

import pytest
from transformers import (
    AutoModelForCausalLM,
    Ernie4_5_MoeConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
)

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.methods.method import method_of
from megatron_l0moe.modules.mixture_of_masks import MOST_SETS
from megatron_l0moe.recipe.recipe import MOST_SETS as MOST_SETS_OF_A_RECIPE
from megatron_l0moe.sizes.parameters import (
    count_parameters,
    l0moe_counts,
    pass_bounds,
    speed_bounds,
)

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MOE = {
    "moe_intermediate_size": 12,
    "moe_k": 2,
    "moe_num_experts": 4,
    "moe_num_shared_experts": 0,
    "moe_layer_start_index": 1,
}
QWEN2_MOE = {
    "moe_intermediate_size": 12,
    "num_experts_per_tok": 2,
    "num_experts": 4,
    "mlp_only_layers": [0],
    "shared_expert_intermediate_size": 0,
}
LLAMA3_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**TINY),
        LlamaConfig(**TINY, attention_bias=True, mlp_bias=True),
        LlamaConfig(**TINY, head_dim=16),
        MistralConfig(**TINY),
        Qwen2Config(**TINY),
        Ernie4_5_MoeConfig(**TINY, **MOE),
        Qwen2MoeConfig(**TINY, **QWEN2_MOE),
        Qwen2MoeConfig(**TINY, **QWEN2_MOE, l0moe_base_family="llama"),
    ],
    ids=[
        "llama",
        "llama-bias",
        "llama-head-dim",
        "mistral",
        "qwen2",
        "ernie-moe",
        "qwen2-moe",
        "qwen2-moe of llama",
    ],
)
def test_total_equals_the_models_weights(config, tied):
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config)
    constants = ["e_score_correction_bias", "shared_expert_gate"]
    if getattr(config, "l0moe_base_family", None) == "llama":
        constants.append("_proj.bias")  # zeros
    weights = sum(
        w.numel() for name, w in model.named_parameters() if not any(part in name for part in constants)
    )
    assert count_parameters(config.to_dict()).total == weights
    config.tie_word_embeddings = not tied  # control
    assert count_parameters(config.to_dict()).total != weights


def test_recipe_and_exported_config_count_alike():
    dense = LlamaConfig(**TINY, tie_word_embeddings=True).to_dict()
    exported = Ernie4_5_MoeConfig(**TINY, **MOE, tie_word_embeddings=True).to_dict()
    planned = l0moe_counts(dense, dense_layers=1, num_experts=4, expert_ffn=12, top_k=2)
    assert planned == count_parameters(exported)
    llama_as_qwen2 = Qwen2MoeConfig(**TINY, **QWEN2_MOE, tie_word_embeddings=True, l0moe_base_family="llama")
    assert planned == count_parameters(llama_as_qwen2.to_dict())
    qwen2 = Qwen2Config(**TINY, tie_word_embeddings=True).to_dict()
    planned = l0moe_counts(qwen2, dense_layers=1, num_experts=4, expert_ffn=12, top_k=2)
    for_sglang = {**exported, "use_bias": True, "l0moe_base_family": "qwen2"}
    assert planned == count_parameters(for_sglang)
    assert planned == count_parameters(
        Qwen2MoeConfig(**TINY, **QWEN2_MOE, tie_word_embeddings=True).to_dict()
    )


def test_active_by_hand():
    moe = count_parameters(Ernie4_5_MoeConfig(**TINY, **MOE, tie_word_embeddings=False).to_dict())
    attention, norms = 3 * (2 * 32 * 32 + 2 * 32 * 16), 7 * 32
    fixed = 96 * 32 + attention + norms + 3 * 32 * 48 + 2 * 4 * 32  # LM head, ..., one dense FFN, routers
    assert moe.active == fixed + 2 * 2 * 3 * 32 * 12
    assert moe.distinct_experts(1) == pytest.approx(2)
    assert moe.distinct_experts(2) == pytest.approx(4 * (1 - 1 / 4))
    assert moe.read(1) == pytest.approx(moe.active)
    assert moe.read(2) == pytest.approx(fixed + 3 * 2 * 3 * 32 * 12)


def test_paper_size_llama():
    dense = count_parameters(LLAMA3_8B)
    moe = l0moe_counts(LLAMA3_8B, dense_layers=8, num_experts=64, expert_ffn=1024, top_k=2)
    assert dense.total / 1e9 == pytest.approx(8.03, abs=0.005)
    assert moe.total / 1e9 == pytest.approx(23.14, abs=0.005)
    assert moe.active / 1e9 == pytest.approx(3.89, abs=0.01)  # without the input embedding
    bounds = speed_bounds(dense, moe)
    assert bounds.prefill == bounds.decode_b1 == pytest.approx(1.93, abs=0.005)
    assert bounds.decode_b8 == pytest.approx(0.99, abs=0.005)


def test_batch_one_reads_the_active_weights():
    dense = count_parameters(LLAMA3_8B)
    moe = l0moe_counts(LLAMA3_8B, dense_layers=8, num_experts=64, expert_ffn=1024, top_k=2)
    assert speed_bounds(dense, moe, batch=1).decode_b8 == pytest.approx(dense.active / moe.active)


def test_bounds_of_one_pass():
    dense = count_parameters(LLAMA3_8B)
    moe = l0moe_counts(LLAMA3_8B, dense_layers=8, num_experts=64, expert_ffn=1024, top_k=2)
    one = pass_bounds(dense, moe, tokens=1, logits=1)
    assert one.active == pytest.approx(one.bytes_read)
    assert one.active == pytest.approx(speed_bounds(dense, moe).decode_b1)
    eight = pass_bounds(dense, moe, tokens=8, logits=8)
    assert eight.active == pytest.approx(one.active)
    assert eight.bytes_read == pytest.approx(speed_bounds(dense, moe).decode_b8)
    # 64 tokens touch 64 (1 - (31/32)^64) = 55.6 of 64 experts, each 3 * 4096 * 1024 weights in 24 layers
    many = pass_bounds(dense, moe, tokens=64, logits=64)
    fixed = moe.active - 24 * 2 * 3 * 4096 * 1024
    assert many.bytes_read == pytest.approx(dense.active / (fixed + 24 * 55.6 * 3 * 4096 * 1024), rel=1e-3)
    assert many.bytes_read < 0.5  # batched decode can be slower than dense
    # a prefill that computes one position's logits has hardly any LM head
    prefill = pass_bounds(dense, moe, tokens=2048, logits=1)
    body = (dense.active - dense.lm_head) / (moe.active - moe.lm_head)
    assert prefill.active == pytest.approx(body, rel=1e-3)
    # measured routing in place of the uniform one
    skewed = pass_bounds(dense, moe, tokens=64, logits=64, distinct_experts=2)
    assert skewed.bytes_read == pytest.approx(one.bytes_read)


@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_distinct_experts_agree_with_drawing_them(tokens):
    counts = l0moe_counts(LLAMA3_8B, dense_layers=8, num_experts=64, expert_ffn=1024, top_k=2)
    draw = random.Random(0)
    seen = [len({k for _ in range(tokens) for k in draw.sample(range(64), 2)}) for _ in range(4000)]
    assert counts.distinct_experts(tokens) == pytest.approx(sum(seen) / len(seen), rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"vocab_size": None}, "vocab_size = None"),
        (
            {"model_type": "ernie4_5_moe", **MOE, "moe_num_shared_experts": 1},
            "shared experts",
        ),
    ],
)
def test_other_configs_are_refused(change, message):
    with pytest.raises(L0MoEError, match=message):
        count_parameters(LLAMA3_8B | change)


def test_too_many_dense_layers():
    with pytest.raises(
        L0MoEError, match=r"model.dense_layers \(32\) must be smaller than the model's 32 layers"
    ):
        l0moe_counts(LLAMA3_8B, dense_layers=32, num_experts=4, expert_ffn=64, top_k=2)


@pytest.mark.parametrize("shared", [0, 1, 3])
def test_mom(shared):
    config = Ernie4_5_MoeConfig(**TINY, **{**MOE, "moe_num_shared_experts": shared}, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config)
    weights = sum(w.numel() for name, w in model.named_parameters() if "e_score_correction_bias" not in name)
    counts = method_of("mom").exported_counts(config.to_dict())
    assert counts.total == weights
    idle = 2 * (4 - 2) * 3 * 32 * 12  # of two layers the experts that a token does not use
    assert counts.active == weights - idle
    if shared:
        with pytest.raises(L0MoEError, match="shared experts"):  # an L0-MoE never has them
            method_of("l0moe").exported_counts(config.to_dict())
    else:
        assert counts == count_parameters(config.to_dict())


def test_a_recipe_allows_as_many_sets_of_masks_as_a_job():
    assert MOST_SETS_OF_A_RECIPE == MOST_SETS

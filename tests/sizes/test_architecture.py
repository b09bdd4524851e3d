"""config.json in both forms, Megatron's flags, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.sizes.architecture import DENSE_FAMILIES, MEGATRON_LLAMA3_SCALING, Architecture

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
LLAMA3 = {"factor": 8.0, **MEGATRON_LLAMA3_SCALING}


def read(folder, **changes):
    config = {**LLAMA, **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return Architecture.from_hf(folder)


def test_both_forms_of_rope_give_the_same(tmp_path):
    old = read(tmp_path, rope_scaling={"rope_type": "llama3", **LLAMA3})
    new = read(
        tmp_path, rope_theta=..., rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}
    )
    assert old == new
    assert old.rope_scaling == {"rope_type": "llama3", **LLAMA3}
    plain = read(tmp_path, rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    assert plain == read(tmp_path)
    assert plain.rope_scaling is None


def test_sizes_and_defaults(tmp_path):
    architecture = read(tmp_path, num_key_value_heads=...)
    assert (architecture.head_dim, architecture.num_query_groups) == (8, 8)
    assert read(tmp_path, head_dim=32).head_dim == 32
    assert read(tmp_path, rope_theta=...).rotary_base == 10000.0
    qwen2 = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096, "use_sliding_window": False}
    assert read(tmp_path, **qwen2).qkv_bias
    assert not read(tmp_path).qkv_bias


def test_the_written_config_reads_back(tmp_path):
    for changes in ({}, {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, {"tie_word_embeddings": True}):
        architecture = read(tmp_path, **changes)
        (tmp_path / "config.json").write_text(json.dumps(architecture.hf_config("float32")))
        assert Architecture.from_hf(tmp_path) == architecture


def test_a_window_limits_the_positions_and_comes_back(tmp_path):
    mistral = {"architectures": ["MistralForCausalLM"], "max_position_embeddings": 32768}
    windowed = read(tmp_path, **mistral, sliding_window=4096)
    assert (windowed.sliding_window, windowed.exact_positions) == (4096, 4096)
    assert windowed.megatron_arguments()["max_position_embeddings"] == 4096
    assert windowed.hf_config("float32")["sliding_window"] == 4096
    assert windowed.hf_config("float32")["max_position_embeddings"] == 32768
    assert read(tmp_path, **mistral).sliding_window == 4096  # the default of transformers
    assert read(tmp_path, **mistral, sliding_window=None).exact_positions == 32768
    with pytest.raises(L0MoEError, match="sliding_window must be a whole number above 0, got 0"):
        read(tmp_path, **mistral, sliding_window=0)


def test_flags_by_hand(tmp_path):
    flags = " ".join(read(tmp_path).megatron_flags())
    assert flags == (
        "--group-query-attention --swiglu --disable-bias-linear --num-layers 2 --hidden-size 64 "
        "--ffn-hidden-size 128 --num-attention-heads 8 --num-query-groups 2 --kv-channels 8 "
        "--max-position-embeddings 512 --normalization RMSNorm --norm-epsilon 1e-05 "
        "--position-embedding-type rope --rotary-percent 1.0 --attention-dropout 0.0 --hidden-dropout 0.0 "
        "--rotary-base 500000 --untie-embeddings-and-output-weights"
    )
    scaled = read(tmp_path, rope_scaling={"rope_type": "llama3", **LLAMA3}, tie_word_embeddings=True)
    assert scaled.megatron_flags()[-5:] == [
        "--rotary-base",
        "500000",
        "--use-rope-scaling",
        "--rope-scaling-factor",
        "8.0",
    ]
    assert "--add-qkv-bias" in read(tmp_path, architectures=["Qwen2ForCausalLM"]).megatron_flags()


PARSE_FLAGS = """
import json, sys
from megatron_l0moe.runtime import cpu
cpu.install()
import argparse
from megatron.training.arguments import add_megatron_arguments
parser = add_megatron_arguments(argparse.ArgumentParser())
jobs = json.loads(sys.argv[1])
print("JSON" + json.dumps([{k: getattr(parser.parse_args(flags), k, "?") for k in names} for flags, names in jobs]))
"""


def test_megatrons_own_parser_makes_of_the_flags_what_the_checkpoint_says(tmp_path):
    architectures = [
        read(tmp_path),
        read(tmp_path, rope_scaling={"rope_type": "llama3", **LLAMA3}, tie_word_embeddings=True),
        read(tmp_path, architectures=["Qwen2ForCausalLM"]),
    ]
    # derived after parsing, in validate_args
    expected = [
        {k: v for k, v in a.megatron_arguments().items() if k != "norm_epsilon"} for a in architectures
    ]
    jobs = [
        [a.megatron_flags(), [*e, "layernorm_epsilon"]] for a, e in zip(architectures, expected, strict=True)
    ]
    command = [sys.executable, "-c", PARSE_FLAGS, json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    parsed = json.loads(done.stdout.split("JSON")[1])
    for got, wanted in zip(parsed, expected, strict=True):
        assert got.pop("layernorm_epsilon") == 1e-5
        assert got == wanted


BAD_CONFIGS = {
    "architecture": (
        {"architectures": ["GemmaForCausalLM"]},
        "architecture GemmaForCausalLM.*supported are LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, and an "
        "L0-MoE",
    ),
    "no architecture": ({"architectures": ..., "model_type": "bert"}, "architecture model_type bert"),
    "size": ({"hidden_size": 0}, "hidden_size must be a whole number above 0, got 0"),
    "no size": ({"vocab_size": ...}, "vocab_size must be a whole number above 0, got None"),
    "groups": ({"num_key_value_heads": 3}, r"num_attention_heads \(8\) must be divisible by.*\(3\)"),
    "no groups": (
        {"num_key_value_heads": 0},
        "num_key_value_heads must be a whole number above 0, got 0",
    ),
    "head_dim": ({"head_dim": 0}, "head_dim must be a whole number above 0, got 0"),
    "odd heads": (
        {"num_attention_heads": 6},
        r"hidden_size \(64\) must be divisible by num_attention_heads \(6\) where head_dim is not given",
    ),
    "no factor": (
        {"rope_scaling": {"rope_type": "llama3", **MEGATRON_LLAMA3_SCALING}},
        "'llama3' needs a number above 0 as factor, got None",
    ),
    "activation": ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
    "bias": ({"attention_bias": True}, "attention_bias = true is not supported"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias = true is not supported"),
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "type 'yarn' is not supported"),
    "llama3": (
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 64}},
        "original_max_position_embeddings = 64, but Megatron computes with 8192",
    ),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "base": ({"rope_theta": 10000.5}, "rope_theta must be a whole number"),
    "window": (
        {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096, "use_sliding_window": True},
        "use_sliding_window = true",
    ),
    "endless layers": (
        {"num_hidden_layers": 10**12},
        "num_hidden_layers must be at most 4096, got 1000000000000",
    ),
    "endless rows": ({"vocab_size": 10**12}, "vocab_size must be at most 2147483647"),
    "true layers": (
        {"num_hidden_layers": True},
        "num_hidden_layers must be a whole number above 0, got True",
    ),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "has a quantization_config"),
    "other file": ({"transformers_weights": "x.safetensors"}, "transformers_weights = 'x.safetensors'"),
    "eps text": ({"rms_norm_eps": "abc"}, "rms_norm_eps must be a number above 0, got abc"),
    "eps null": ({"rms_norm_eps": None}, "rms_norm_eps must be a number above 0, got None"),
    "eps negative": ({"rms_norm_eps": -1}, "rms_norm_eps must be a number above 0, got -1"),
    "eps infinite": ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a number above 0, got inf"),
    "eps endless": ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a number above 0, got 1000"),
    "positions text": ({"max_position_embeddings": "x"}, "max_position_embeddings must be a whole number"),
    "positions null": ({"max_position_embeddings": None}, "max_position_embeddings must be a whole number"),
    "ties text": ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, got 'no'"),
    "bias text": ({"attention_bias": "no"}, "attention_bias must be true or false, got 'no'"),
    "rope list": ({"rope_parameters": [1]}, r"must be an object, got \[1\]"),
    "rope text": ({"rope_scaling": "linear"}, "must be an object, got linear"),
    "base null": ({"rope_theta": None}, "rope_theta must be a number above 0, got None"),
    "base infinite": ({"rope_theta": float("inf")}, "rope_theta must be a number above 0, got inf"),
    "two bases": (
        {"rope_parameters": {"rope_theta": 10000.0}},
        "rope_theta is 500000.0, but 10000.0 in rope_parameters",
    ),
    "by layer": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
        "RoPE with full_attention is not",
    ),
    "architectures number": ({"architectures": 5}, "architecture 5, which is not supported"),
    "architectures empty": ({"architectures": []}, "architecture model_type llama, which"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_unsupported_models_are_named(tmp_path, changes, message):
    with pytest.raises(L0MoEError, match=message):
        read(tmp_path, **changes)


def test_missing_folder_and_broken_config(tmp_path):
    with pytest.raises(L0MoEError, match="gone does not exist"):
        Architecture.from_hf(tmp_path / "gone")
    with pytest.raises(L0MoEError, match=r"has no config\.json"):
        Architecture.from_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden')
    with pytest.raises(L0MoEError, match="is not valid JSON"):
        Architecture.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(L0MoEError, match="must hold a JSON object, not a list"):
        Architecture.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(L0MoEError, match="nested too deeply"):
        Architecture.from_hf(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff{}")
    with pytest.raises(L0MoEError, match="is not valid JSON"):
        Architecture.from_hf(tmp_path)


def test_no_torch_is_imported():
    code = "import sys, megatron_l0moe.sizes.architecture; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
KEYS = sorted(
    {
        *LLAMA,
        "rope_scaling",
        "rope_parameters",
        "head_dim",
        "sliding_window",
        "use_sliding_window",
        "hidden_act",
    }
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3),
    st.sampled_from(sorted(DENSE_FAMILIES)),
)
def test_any_value_is_taken_or_refused_with_its_file(changes, family):
    config = {**LLAMA, "architectures": [DENSE_FAMILIES[family].hf_architecture], **changes}
    problem = None
    try:
        Architecture.from_config(config, Path("config.json")).megatron_flags()
    except L0MoEError as error:
        problem = str(error)
    assert problem is None or problem.startswith("config.json")

"""A GGUF file becomes an ordinary checkpoint with the same weights and the tokenizer that it was trained with."""

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_l0moe.conversion.convert import convert_dense
from megatron_l0moe.conversion.gguf import gguf_to_hf
from megatron_l0moe.errors import L0MoEError

# Byte-level BPE: the 256 bytes as GPT-2 writes them, two merges, one special token in front.
BYTES = (
    [chr(b) for b in range(33, 127)] + [chr(b) for b in range(161, 173)] + [chr(b) for b in range(174, 256)]
)
BYTES += [chr(256 + n) for n in range(256 - len(BYTES))]
MERGES = ["\u0120 \u0120", "h e"]
TOKENS = ["<|endoftext|>", *BYTES, *(merge.replace(" ", "") for merge in MERGES)]
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    max_position_embeddings=128,
)
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permuted(weight, heads):
    """llama.cpp stores q and k with interleaved RoPE rows."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(file, *, architecture="llama", pre="smollm"):
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("toy")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_license("apache-2.0")
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(TOKENS) - 1))
    writer.add_token_merges(MERGES)
    for kind in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        kind(0)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    for layer in range(2):
        for hf, name in NAMES.items():
            weight = state[f"model.layers.{layer}.{hf}.weight"]
            if name in ("attn_q", "attn_k"):
                weight = permuted(weight, {"attn_q": 4, "attn_k": 2}[name])
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    model = write_gguf(folder / "toy.gguf")
    result = gguf_to_hf(folder / "toy.gguf", folder / "hf")
    return folder, model, result


def test_weights_and_config(imported):
    folder, model, result = imported
    loaded = AutoModelForCausalLM.from_pretrained(folder / "hf")
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    assert result["name"] == "toy"
    assert (folder / "hf/README.md").read_text() == "---\nlicense: apache-2.0\n---\n"
    for (name, got), (other, expected) in zip(
        loaded.named_parameters(), model.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(got, expected), name
    assert loaded.config.rms_norm_eps == 1e-5
    assert loaded.config.tie_word_embeddings is True
    assert loaded.config.rope_parameters["rope_theta"] == 100000.0
    assert not hasattr(loaded.config, "quantization_config")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_tokenizer_splits_as_the_model_was_trained(imported):
    """With the plain GPT-2 splitting, one of the two spaces would stay with the digit: ' ' + ' 4'."""
    folder, _, _ = imported
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0
    assert tokenizer.tokenize("  42 he") == ["\u0120\u0120", "4", "2", "\u0120", "he"]
    for text in ("he said  42\n", "<|endoftext|>he", "\u00fcn\u00ef \u65e5\u672c"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_result_converts(imported, tmp_path):
    folder, _, _ = imported
    assert convert_dense(folder / "hf", tmp_path)["tensors"] == 20


def test_bfloat16(imported, tmp_path):
    folder, _, _ = imported
    gguf_to_hf(folder / "toy.gguf", tmp_path / "hf", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").dtype is torch.bfloat16


def test_existing_results_are_kept(imported):
    folder, _, _ = imported
    with pytest.raises(L0MoEError, match="already holds a checkpoint"):
        gguf_to_hf(folder / "toy.gguf", folder / "hf")


def test_missing_foreign_and_truncated_files(imported, tmp_path):
    folder, _, _ = imported
    with pytest.raises(L0MoEError, match=r"gone\.gguf does not exist"):
        gguf_to_hf(tmp_path / "gone.gguf", tmp_path / "hf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(L0MoEError, match="is not a GGUF file"):
        gguf_to_hf(tmp_path / "text.gguf", tmp_path / "hf")
    data = (folder / "toy.gguf").read_bytes()
    for size in (4, 50, 1000, len(data) // 2, len(data) - 64):
        (tmp_path / "short.gguf").write_bytes(data[:size])
        with pytest.raises(L0MoEError, match=r"short\.gguf is truncated"):
            gguf_to_hf(tmp_path / "short.gguf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_other_architectures_and_tokenizers(tmp_path):
    write_gguf(tmp_path / "gemma.gguf", architecture="gemma")
    with pytest.raises(L0MoEError, match=r"architecture 'gemma'.*supported are llama, qwen2"):
        gguf_to_hf(tmp_path / "gemma.gguf", tmp_path / "hf")
    write_gguf(tmp_path / "odd.gguf", pre="odd")
    with pytest.raises(L0MoEError, match="word splitting 'odd' is not supported"):
        gguf_to_hf(tmp_path / "odd.gguf", tmp_path / "hf")
    assert not (tmp_path / "hf/config.json").exists()

"""A GGUF file becomes an ordinary checkpoint with the same weights and the tokenizer that it was trained with."""

import json
import math
import shutil
import tempfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

from megatron_l0moe.conversion.convert import convert_dense
from megatron_l0moe.conversion.gguf import GGUFFile, gguf_to_hf
from megatron_l0moe.conversion.gguf_tokenizer import tokenizer_of
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.sizes.architecture import MEGATRON_LLAMA3_SCALING

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
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def header(writer, *, pre="smollm"):
    """What llama.cpp's converter writes of CONFIG and of its tokenizer."""
    writer.add_name("toy")
    writer.add_license("apache-2.0")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(TOKENS) - 1))
    writer.add_token_merges(MERGES)
    for kind in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        kind(0)


def make_model(config=CONFIG):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return model


def gguf_tensors(model, *, turned=True):
    """All tensors under llama.cpp's names, q and k of a llama file turned."""
    config, state = model.config, {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    found = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        found["output.weight"] = state["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        for hf, name in NAMES.items():
            for suffix in ("weight", "bias"):
                weight = state.get(f"model.layers.{layer}.{hf}.{suffix}")
                if weight is None:
                    continue
                if turned and name in ("attn_q", "attn_k"):
                    weight = permuted(weight, {"attn_q": 4, "attn_k": 2}[name])
                found[f"blk.{layer}.{name}.{suffix}"] = np.ascontiguousarray(weight)
    return found


def write(file, tensors, *, architecture="llama", fields=header, quantise=lambda name: None):
    writer = gguf.GGUFWriter(file, architecture)
    fields(writer)
    for name, array in tensors.items():
        kind = quantise(name)
        if kind is None:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_gguf(file, *, architecture="llama", pre="smollm"):
    model = make_model()
    write(file, gguf_tensors(model), architecture=architecture, fields=lambda w: header(w, pre=pre))
    return model


def with_fields(change):
    def fields(writer):
        header(writer)
        change(writer)

    return fields


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


def assert_state(folder, expected, exact=True):
    got = load_file(folder / "model.safetensors")
    expected = {name: tensor for name, tensor in expected.items() if name in got or name != "lm_head.weight"}
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor) if exact else (got[name] - tensor).abs().max() < 0.1, name


def test_qwen2_with_biases_and_a_head_of_its_own(tmp_path):
    sizes = {key: getattr(CONFIG, key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    config = Qwen2Config(
        **sizes,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
    )
    model = make_model(config)
    tensors = gguf_tensors(model, turned=False)
    assert sum(name.endswith(".bias") for name in tensors) == 6
    write(tmp_path / "q.gguf", tensors, architecture="qwen2", fields=lambda w: header(w, pre="qwen2"))
    gguf_to_hf(tmp_path / "q.gguf", tmp_path / "hf")
    assert_state(tmp_path / "hf", model.state_dict())


KINDS = [
    gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_kinds_of_numbers_by_hand(tmp_path, kind):
    """Blocks of 32 out of all of -8 to 7 times a quarter: exact in all kinds but those of 5 and 8 bits."""
    model = make_model()
    values = torch.arange(32) % 16 - 8
    for parameter in model.parameters():
        if parameter.ndim == 2:
            rows = torch.roll(values, 5).repeat(parameter.numel() // 32).view_as(parameter)
            parameter.data = rows * 0.25
    tensors = gguf_tensors(model)
    matrices = {name for name, array in tensors.items() if array.ndim == 2}
    file = write(tmp_path / "k.gguf", tensors, quantise=lambda name: kind if name in matrices else None)
    gguf_to_hf(file, tmp_path / "hf")
    assert_state(tmp_path / "hf", model.state_dict(), exact=kind.name not in ("Q5_0", "Q5_1", "Q8_0"))


def test_k_quants_are_expanded_as_the_gguf_package_does(tmp_path):
    """One block of 256: the bytes are made up, the package's own expansion of all of them is the reference."""
    kind = gguf.GGMLQuantizationType.Q4_K
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 255, (8, 144), dtype=np.uint8)
    raw[:, :4] = np.array([0.01, 0.02], dtype=np.float16).view(np.uint8)  # the two scales of a block
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    writer.add_tensor("some.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "k.gguf")
    assert file.shape("some.weight") == (8, 256)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    assert torch.equal(torch.cat([file.read("some.weight", 0, 3), file.read("some.weight", 3, 8)]), expected)


def factors(factor=8.0, head_dim=8, base=100000.0):
    """Llama-3.1's factors, frequency by frequency, as llama.cpp's converter makes them."""
    found = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * base ** (i / head_dim)
        if wavelength < 8192 / 4:
            found.append(1.0)
        elif wavelength > 8192:
            found.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, dtype=np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_factors_become_llama3_scaling(tmp_path, factor):
    tensors = gguf_tensors(make_model()) | {"rope_freqs.weight": factors(factor)}
    gguf_to_hf(write(tmp_path / "a.gguf", tensors), tmp_path / "hf")
    scaling = json.loads((tmp_path / "hf/config.json").read_text())["rope_scaling"]
    assert scaling == {"rope_type": "llama3", "factor": factor, **MEGATRON_LLAMA3_SCALING}
    one = tensors | {"rope_freqs.weight": np.ones(4, dtype=np.float32)}
    gguf_to_hf(write(tmp_path / "one.gguf", one), tmp_path / "one")
    assert json.loads((tmp_path / "one/config.json").read_text())["rope_scaling"] is None


def refused(tmp_path, message, tensors=None, **changes):
    tensors = gguf_tensors(make_model()) if tensors is None else tensors
    file = write(tmp_path / "bad.gguf", tensors, **changes)
    with pytest.raises(L0MoEError, match=message):
        gguf_to_hf(file, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


HEADERS = {
    "experts": (lambda w: w.add_expert_count(4), r"llama\.expert_count = 4, which changes"),
    "linear": (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "type 'yarn' is not supported"),
    "old linear": (lambda w: w.add_float32("llama.rope.scale_linear", 4.0), r"rope\.scale_linear = 4\.0"),
    "window": (lambda w: w.add_sliding_window(64), r"attention\.sliding_window = 64"),
    "scale": (lambda w: w.add_logit_scale(0.5), r"llama\.logit_scale = 0\.5"),
    "unheard of": (lambda w: w.add_bool("llama.swirl", True), r"llama\.swirl = True"),
    "part of a head": (lambda w: w.add_value_length(4), r"value_length = 4, but only the size of a head, 8"),
    "adapter": (lambda w: w.add_string("adapter.type", "lora"), r"adapter\.type"),
    "not a model": (lambda w: w.add_type("mmproj"), "no model but of type 'mmproj'"),
    "template": (lambda w: w.add_string("tokenizer.chat_template.../x", "a"), "no plain name"),
    "spaces": (lambda w: w.add_add_space_prefix(True), "add_space_prefix"),
}


@pytest.mark.parametrize(("change", "message"), HEADERS.values(), ids=HEADERS.keys())
def test_what_changes_the_computation_is_refused(tmp_path, change, message):
    refused(tmp_path, message, fields=with_fields(change))


def test_keys_that_change_nothing_pass(tmp_path):
    def harmless(writer):
        writer.add_expert_count(0)
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_key_length(8)
        writer.add_value_length(8)
        writer.add_string("somebody.quantized_by", "me")
        writer.add_chat_template(
            [{"name": "default", "template": "{{ a }}"}, {"name": "tool_use", "template": "{{ b }}"}]
        )

    tensors = gguf_tensors(make_model())
    gguf_to_hf(write(tmp_path / "a.gguf", tensors, fields=with_fields(harmless)), tmp_path / "hf")
    assert (tmp_path / "hf/chat_template.jinja").read_text() == "{{ a }}"
    assert (tmp_path / "hf/additional_chat_templates/tool_use.jinja").read_text() == "{{ b }}"


def test_every_tensor_is_used_and_none_made_up(tmp_path):
    tensors = gguf_tensors(make_model())
    without = {name: array for name, array in tensors.items() if name != "blk.1.ffn_up.weight"}
    refused(tmp_path, r"lacks the tensor blk\.1\.ffn_up\.weight", without)
    more = tensors | {"blk.0.attn_q.bias": np.zeros(32, dtype=np.float32)}
    refused(tmp_path, r"holds the tensor blk\.0\.attn_q\.bias, which", more)
    both = without | {"blk.2.ffn_up.weight": tensors["blk.1.ffn_up.weight"]}
    refused(
        tmp_path,
        r"holds the tensor blk\.2\.ffn_up\.weight.*, and lacks the tensor blk\.1\.ffn_up\.weight",
        both,
    )
    other = tensors | {"rope_freqs.weight": factors() * 1.01}
    refused(tmp_path, r"rope_freqs\.weight are not those of Llama-3\.1", other)
    narrow = tensors | {"blk.0.ffn_up.weight": tensors["blk.0.ffn_up.weight"][:-1]}
    refused(tmp_path, r"blk\.0\.ffn_up\.weight has the shape \[63, 32\], but .* needs \[64, 32\]", narrow)


def write_parts(folder, tensors, *, count=3, total=None):
    """The first part holds the header alone, as llama.cpp's --no-tensor-first-split, or with tensors."""
    names = sorted(tensors)
    for number in range(count):
        part = {name: tensors[name] for name in names[number::count]}

        def fields(writer, number=number):
            if number == 0:
                header(writer)
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", count)
            writer.add_int32("split.tensors.count", total or len(tensors))

        write(folder / f"toy-{number + 1:05d}-of-{count:05d}.gguf", part, fields=fields)


@pytest.mark.parametrize("given", [1, 2])
def test_split_files_are_read_whole(tmp_path, given):
    model = make_model()
    write_parts(tmp_path, gguf_tensors(model))
    gguf_to_hf(tmp_path / f"toy-{given:05d}-of-00003.gguf", tmp_path / "hf")
    assert_state(tmp_path / "hf", model.state_dict())


def test_parts_that_are_missing_or_foreign_are_named(tmp_path):
    tensors = gguf_tensors(make_model())
    first, last = (tmp_path / f"toy-{number:05d}-of-00003.gguf" for number in (1, 3))

    def refused_parts(message, file=first):
        with pytest.raises(L0MoEError, match=message):
            gguf_to_hf(file, tmp_path / "hf")
        assert not (tmp_path / "hf").exists()

    write_parts(tmp_path, tensors)
    last.rename(tmp_path / "gone")
    refused_parts(r"toy-00003-of-00003\.gguf is missing, one of the 3 parts")
    shutil.copy(tmp_path / "toy-00002-of-00003.gguf", last)
    refused_parts(r"toy-00003-of-00003\.gguf says that it is part 1 \(counted from 0\) of 3")
    first.rename(tmp_path / "other.gguf")
    refused_parts(r"other\.gguf is one of 3 parts of a model but is not named so", tmp_path / "other.gguf")
    write_parts(tmp_path, tensors, total=99)
    refused_parts("all parts hold 99 tensors, but they hold 20")
    write_parts(tmp_path, tensors)
    twice = {"token_embd.weight": tensors["token_embd.weight"]}
    fields = {"split.no": 2, "split.count": 3}
    write(last, twice, fields=lambda w: [w.add_uint16(key, value) for key, value in fields.items()])
    refused_parts("token_embd.weight, which toy-0000.-of-00003.gguf holds too|all parts hold 20 tensors")


SPM_TEXT = [
    "flour butter oven 12 34",
    "the mast and the keel",
    "salt, pepper; salt",
    "quark energy photon mass",
] * 20


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    """A sentencepiece BPE like Llama-2's: byte fallback, a space in front, nothing normalised."""
    file = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    settings = {"model_type": "bpe", "vocab_size": 330, "byte_fallback": True, "minloglevel": 2}
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    with file.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SPM_TEXT), model_writer=stream, add_dummy_prefix=True, **settings
        )
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


def spm_fields(spm, changes=lambda writer: None, scores=lambda score: score):
    def kind(i):
        if spm.is_unknown(i):
            return gguf.TokenType.UNKNOWN
        if spm.is_control(i):
            return gguf.TokenType.CONTROL
        return gguf.TokenType.BYTE if spm.is_byte(i) else gguf.TokenType.NORMAL

    size = spm.get_piece_size()
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [spm.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.scores": [scores(spm.get_score(i)) for i in range(size)],
        "tokenizer.ggml.token_type": [int(kind(i)) for i in range(size)],
    }
    changes(fields)
    return fields


def test_a_sentencepiece_tokenizer_encodes_as_sentencepiece(spm):
    made = tokenizer_of(spm_fields(spm), Path("a.gguf"), spm.get_piece_size())
    tokenizer = made.tokenizer
    texts = (
        "flour butter",
        " flour",
        "  two  spaces ",
        "a\n\nb\tc",
        "1234 0",
        "\u65e5 \U0001f600",
        "",
        " ",
        "z" * 50,
    )
    for text in texts:
        assert tokenizer.encode(text, add_special_tokens=False).ids == spm.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text
    assert tokenizer.encode("flour").ids == [1, *spm.encode("flour")]  # llama.cpp's default: a begin token
    assert made.ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    assert made.special == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode("salt</s>pepper", add_special_tokens=False).ids == spm.encode("salt</s>pepper")


BAD_TOKENIZERS = {
    "normalised": (
        lambda f: f.update({"tokenizer.ggml.remove_extra_whitespaces": True}),
        "remove_extra_whitespaces",
    ),
    "no scores": (lambda f: f.pop("tokenizer.ggml.scores"), r"no list tokenizer\.ggml\.scores"),
    "short": (lambda f: f["tokenizer.ggml.scores"].pop(), "scores for"),
    "twice": (lambda f: f["tokenizer.ggml.tokens"].__setitem__(300, "<s>"), "different tokens"),
    "id beyond": (lambda f: f.update({"tokenizer.ggml.eos_token_id": 9999}), "eos_token_id must be below"),
    "unigram": (lambda f: f.update({"tokenizer.ggml.model": "t5"}), "kind 't5' is not supported"),
    "no unknown": (
        lambda f: f["tokenizer.ggml.token_type"].__setitem__(0, 3),
        "0 tokens for what is unknown",
    ),
    "a byte lost": (
        lambda f: f["tokenizer.ggml.token_type"].__setitem__(3 + ord("z"), 1),
        "its (tokenizer|sentence)",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_TOKENIZERS.values(), ids=BAD_TOKENIZERS.keys())
def test_tokenizers_that_cannot_be_expressed_are_refused(spm, change, message):
    with pytest.raises(L0MoEError, match=message):
        tokenizer_of(spm_fields(spm, change), Path("a.gguf"), spm.get_piece_size())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_changed_header_is_read_or_refused_in_one_sentence(imported, changes):
    folder, _, _ = imported
    data = bytearray((folder / "toy.gguf").read_bytes())
    for place, value in changes:
        data[place] = value
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "toy.gguf").write_bytes(data)
        problem = ""
        try:
            gguf_to_hf(Path(scratch) / "toy.gguf", Path(scratch) / "hf")
        except L0MoEError as error:
            problem = str(error)
    assert "\n" not in problem

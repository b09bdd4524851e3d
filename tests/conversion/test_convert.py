"""HF -> Megatron -> HF is byte-identical, and Megatron computes the same logits as transformers."""

import json
import shutil

import pytest
import torch
from conversion.reference import forward
from conversion.toy_checkpoints import MODELS, VOCAB, save_model, sizes_of, state_of
from transformers import AutoModelForCausalLM

from megatron_l0moe.checkpoints import rules
from megatron_l0moe.checkpoints.safetensors_files import INDEX_NAME, SafetensorsFolder
from megatron_l0moe.checkpoints.torch_dist import CheckpointReader, CheckpointWriter
from megatron_l0moe.conversion.convert import convert_any, convert_dense
from megatron_l0moe.conversion.export import export_dense
from megatron_l0moe.errors import L0MoEError

# float32 model against float64 reference; logits are of size 10
FP32_LOGITS_ATOL = 1e-4


def bytes_of(folder):
    source = SafetensorsFolder(folder)
    return {
        name: (source.read(name).dtype, source.read(name).flatten().view(torch.uint8))
        for name in source.names
    }


def assert_same_bytes(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name][0] is b[name][0], name
        assert torch.equal(a[name][1], b[name][1]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_byte_identical_and_loads_with_the_same_logits(tmp_path, name, dtype):
    source = save_model(tmp_path / "hf", name, dtype=dtype)
    convert_dense(source, tmp_path / "converted")
    export_dense(tmp_path / "converted/megatron", source, tmp_path / "back")
    assert_same_bytes(bytes_of(source), bytes_of(tmp_path / "back"))
    ids = torch.randint(0, VOCAB, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            for folder in (source, tmp_path / "back")
        ]
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_forward_is_that_of_transformers(tmp_path, name):
    source = save_model(tmp_path / "hf", name)
    ids = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source)(ids).logits.double()
    state, sizes = state_of(source), sizes_of(source)
    torch.testing.assert_close(forward(state, sizes, ids), expected, atol=FP32_LOGITS_ATOL, rtol=0)
    swapped = {
        key.replace("gate_proj", "@").replace("up_proj", "gate_proj").replace("@", "up_proj"): value
        for key, value in state.items()
    }
    assert (forward(swapped, sizes, ids) - expected).abs().max() > 100 * FP32_LOGITS_ATOL


@pytest.mark.parametrize("block", [rules.BLOCK_VALUES, 100], ids=["whole", "blocks"])
def test_sharded_source_gives_the_same_checkpoint(tmp_path, monkeypatch, block):
    monkeypatch.setattr(rules, "BLOCK_VALUES", block)
    source = save_model(tmp_path / "hf")
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    convert_dense(tmp_path / "sharded", tmp_path / "converted")
    export_dense(tmp_path / "converted/megatron", source, tmp_path / "back", max_shard_bytes=30_000)
    assert (tmp_path / "back" / INDEX_NAME).is_file()
    assert_same_bytes(bytes_of(source), bytes_of(tmp_path / "back"))


def test_settings_say_what_was_converted(tmp_path):
    convert_dense(save_model(tmp_path / "hf", "llama-tied"), tmp_path / "converted")
    reader = CheckpointReader(tmp_path / "converted/megatron")
    assert reader.settings["version"] == 1
    assert reader.settings["stage"] == "dense"
    assert reader.settings["architecture"]["tied_embeddings"] is True
    assert "output_layer.weight" not in reader.shapes


def rewrite(folder, change):
    """Load all tensors of a one-file checkpoint, change the dictionary, write it back."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


BAD_TENSORS = {
    "unknown": (
        put("model.layers.0.mlp.gate.weight", torch.zeros(2)),
        "holds the tensor model.layers.0.mlp.gate.weight",
    ),
    "another layer": (
        put("model.layers.3.input_layernorm.weight", torch.zeros(32)),
        "holds the tensor model.layers.3",
    ),
    "missing": (
        drop("model.layers.1.mlp.up_proj.weight"),
        "lacks the tensor model.layers.1.mlp.up_proj.weight",
    ),
    "shape": (
        put("model.norm.weight", torch.zeros(31)),
        r"model.norm.weight has the shape \[31\].*needs \[32\]",
    ),
    "nan": (
        put("model.norm.weight", torch.full((32,), torch.nan)),
        "model.norm.weight holds 32 values that are NaN",
    ),
    "infinite": (put("model.norm.weight", torch.full((32,), torch.inf)), "NaN or infinite"),
    "integer": (
        put("model.norm.weight", torch.zeros(32, dtype=torch.int32)),
        "int32, but.*not quantised or integer",
    ),
    "type": (put("model.norm.weight", torch.zeros(32, dtype=torch.uint8)), "type U8, which is not supported"),
    "float64": (
        put("model.norm.weight", torch.zeros(32, dtype=torch.float64)),
        "float64, but weights must be bfloat16, float16 or float32",
    ),
    "mixed": (
        put("model.layers.1.mlp.up_proj.weight", torch.zeros(48, 32, dtype=torch.bfloat16)),
        r"1\.mlp\.up_proj\.weight is torch\.bfloat16, but model\.layers\.1\.mlp\.gate_proj\.weight, with",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_bad_tensors_stop_and_leave_nothing(tmp_path, change, message):
    source = save_model(tmp_path / "hf")
    rewrite(source, change)
    with pytest.raises(L0MoEError, match=message):
        convert_dense(source, tmp_path / "converted")
    assert not list(tmp_path.glob("converted/megatron/*"))


def test_one_rule_may_have_another_dtype_than_the_next(tmp_path):
    """Norms in float32 beside bfloat16 weights, as some models are stored, keep their bytes."""
    source = save_model(tmp_path / "hf", dtype=torch.bfloat16)
    rewrite(source, put("model.norm.weight", torch.randn(32)))
    convert_dense(source, tmp_path / "converted")
    export_dense(tmp_path / "converted/megatron", source, tmp_path / "back")
    assert_same_bytes(bytes_of(source), bytes_of(tmp_path / "back"))


def test_bad_input_leaves_the_last_good_checkpoint_as_it_was(tmp_path):
    source = save_model(tmp_path / "hf")
    convert_dense(source, tmp_path / "converted")
    good = {file: file.read_bytes() for file in (tmp_path / "converted").rglob("*") if file.is_file()}
    rewrite(source, put("model.norm.weight", torch.full((32,), torch.nan)))
    for message in ("already holds a checkpoint", "NaN"):
        out = tmp_path / ("converted" if "already" in message else "other")
        with pytest.raises(L0MoEError, match=message):
            convert_dense(source, out)
    assert good == {file: file.read_bytes() for file in (tmp_path / "converted").rglob("*") if file.is_file()}


def remove_a_shard(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def cut_a_shard(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)


def name_an_absent_tensor(folder):
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["model.ghost.weight"] = sorted(set(index["weight_map"].values()))[0]
    (folder / INDEX_NAME).write_text(json.dumps(index))


BAD_SHARDS = {
    "missing": (remove_a_shard, r"model-00002-of-.*\.safetensors is missing, but .* names it; download"),
    "truncated": (cut_a_shard, r"model-00002-of-.*\.safetensors is truncated or not a safetensors file"),
    "absent tensor": (name_an_absent_tensor, r"holds the tensor model\.ghost\.weight, but it does not"),
}


@pytest.mark.parametrize(("damage", "message"), BAD_SHARDS.values(), ids=BAD_SHARDS.keys())
def test_a_damaged_sharded_checkpoint_stops_and_leaves_nothing(tmp_path, damage, message):
    source = tmp_path / "sharded"
    save = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "hf")).save_pretrained
    save(source, max_shard_size="20KB")
    damage(source)
    with pytest.raises(L0MoEError, match=message):
        convert_dense(source, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickled_weights_are_not_loaded_though_there(tmp_path, name):
    source = save_model(tmp_path / "hf")
    (source / "model.safetensors").rename(source / name)
    with pytest.raises(L0MoEError, match=rf"pickled weights \({name}\), which are not loaded"):
        convert_any(source, tmp_path / "converted")


def test_old_computed_tensors_are_ignored_and_a_stored_tied_output_must_be_the_embedding(tmp_path):
    source = save_model(tmp_path / "hf", "llama-tied")
    rewrite(source, put("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)))
    embedding = state_of(source)["model.embed_tokens.weight"]
    rewrite(source, put("lm_head.weight", embedding.clone()))
    convert_dense(source, tmp_path / "converted")
    rewrite(source, put("lm_head.weight", embedding + 1))
    with pytest.raises(L0MoEError, match="tie_word_embeddings = true, but lm_head"):
        convert_dense(source, tmp_path / "again")
    rewrite(source, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(L0MoEError, match=r"hf lacks the tensor model\.embed_tokens\.weight, which"):
        convert_dense(source, tmp_path / "again")


def test_an_existing_checkpoint_is_not_written_over(tmp_path):
    source = save_model(tmp_path / "hf")
    convert_dense(source, tmp_path / "converted")
    with pytest.raises(L0MoEError, match="already holds a checkpoint"):
        convert_dense(source, tmp_path / "converted")
    with pytest.raises(L0MoEError, match=r"already holds a checkpoint \(model.safetensors\)"):
        export_dense(tmp_path / "converted/megatron", source, source)


def test_padding_of_the_vocabulary_is_dropped(tmp_path):
    source = save_model(tmp_path / "hf")
    convert_dense(source, tmp_path / "converted")
    reader = CheckpointReader(tmp_path / "converted/megatron")
    with CheckpointWriter(tmp_path / "padded", reader.common) as writer:
        for name in reader.model_names():
            tensor = reader.read(name)
            vocabulary = name in ("embedding.word_embeddings.weight", "output_layer.weight")
            writer.write(
                name, torch.nn.functional.pad(tensor, (0, 0, 0, 64), value=7.0) if vocabulary else tensor
            )
    export_dense(tmp_path / "padded", source, tmp_path / "back")
    assert_same_bytes(bytes_of(source), bytes_of(tmp_path / "back"))


def test_a_checkpoint_with_fewer_tokens_than_the_base_is_refused(tmp_path):
    source = save_model(tmp_path / "hf")
    convert_dense(source, tmp_path / "converted")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": VOCAB + 1}))
    with pytest.raises(L0MoEError, match=r"embedding.* has the shape \[64, 32\], .* needs \[65, 32\]"):
        export_dense(tmp_path / "converted/megatron", source, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_dense_export_of_another_size_is_refused(tmp_path):
    source = save_model(tmp_path / "hf")
    convert_dense(source, tmp_path / "converted")
    other = tmp_path / "other"
    shutil.copytree(source, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(L0MoEError, match=r"holds the tensor decoder\.layers\.2\."):
        export_dense(tmp_path / "converted/megatron", other, tmp_path / "back")
    assert not (tmp_path / "back/config.json").exists()

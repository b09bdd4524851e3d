"""Encoders through FlagEmbedding: both code paths with real (random) models, against transformers itself.

Vectors in several files: the same rows as one array, whatever is asked for; damage is named.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from megatron_l0moe.curate.embedding import (
    Encoder,
    VectorShards,
    check_encoder,
    find_model,
    is_bge_m3,
    load_encoder,
    pooling_method,
)
from megatron_l0moe.errors import L0MoEError

FP32_PADDING_ATOL = 1e-5  # padded batches reduce in another order than one text alone
TEXTS = ["flour butter oven", "mast keel anchor harbour tide " * 9, "quark", "wave " * 500, "energy photon"]


def naive(folder: Path, text: str, max_tokens: int, pooling: str) -> np.ndarray:
    """One text at a time, no padding."""
    tokens = AutoTokenizer.from_pretrained(folder)(
        text, truncation=True, max_length=max_tokens, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state[0]
    vector = hidden[0] if pooling == "cls" else hidden.mean(dim=0)
    return (vector / vector.norm()).numpy()


def embed(encoder: Encoder, texts: Iterable[str]) -> np.ndarray:
    return np.concatenate(list(encoder.embed_chunks(texts, lambda count: None)))


@pytest.mark.parametrize(("fixture", "pooling"), [("tiny_encoder", "mean"), ("tiny_bge_m3", "cls")])
def test_equals_transformers(request: pytest.FixtureRequest, fixture: str, pooling: str) -> None:
    folder = request.getfixturevalue(fixture)
    vectors = embed(load_encoder(str(folder), max_tokens=12, batch_size=2), TEXTS)
    assert vectors.shape == (5, 32)
    assert vectors.dtype == np.float32
    expected = np.stack([naive(folder, text, 12, pooling) for text in TEXTS])
    np.testing.assert_allclose(vectors, expected, atol=FP32_PADDING_ATOL)
    other = np.stack([naive(folder, text, 12, {"mean": "cls", "cls": "mean"}[pooling]) for text in TEXTS])
    assert not np.allclose(vectors, other, atol=1e-2)  # control: the other pooling is another vector
    assert is_bge_m3(folder) == (fixture == "tiny_bge_m3")


def test_only_the_head_of_a_text_is_tokenised(tiny_encoder: Path, monkeypatch) -> None:
    encoder = load_encoder(str(tiny_encoder), max_tokens=8, batch_size=4)
    seen: list[int] = []
    encode = encoder._model.encode
    monkeypatch.setattr(
        encoder._model, "encode", lambda texts, **k: seen.extend(map(len, texts)) or encode(texts, **k)
    )
    long, short = embed(encoder, ["sail wind " * 100_000, "sail wind " * 50])
    assert max(seen) == encoder.head_chars == 128
    np.testing.assert_allclose(long, short, atol=FP32_PADDING_ATOL)


def test_chunks_do_not_change_vectors(tiny_encoder: Path, monkeypatch) -> None:
    encoder = load_encoder(str(tiny_encoder), max_tokens=12, batch_size=2)
    whole = embed(encoder, TEXTS)
    monkeypatch.setattr("megatron_l0moe.curate.embedding.CHUNK_DOCUMENTS", 2)
    np.testing.assert_allclose(embed(encoder, iter(TEXTS)), whole, atol=FP32_PADDING_ATOL)


def test_more_tokens_than_positions(tiny_encoder: Path, tiny_bge_m3: Path) -> None:
    with pytest.raises(L0MoEError, match=r"data\.embedding_max_tokens \(67\) is more than the 66 tokens"):
        load_encoder(str(tiny_encoder), max_tokens=67, batch_size=2)
    with pytest.raises(L0MoEError, match="more than the 64 tokens"):  # two positions belong to the padding id
        load_encoder(str(tiny_bge_m3), max_tokens=65, batch_size=2)


def test_runs_on_the_device_of_the_runtime(tiny_encoder: Path, monkeypatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("FlagEmbedding.FlagModel", lambda folder, *, devices, **k: asked.append(devices))
    monkeypatch.setattr("FlagEmbedding.FlagModel.__name__", "FlagModel")
    monkeypatch.setattr("megatron_l0moe.runtime.cpu.has_cuda", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    load_encoder(str(tiny_encoder), max_tokens=8, batch_size=2)
    assert asked == ["cuda:3"]


def test_missing_model_says_how_to_get_it(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nowhere"), "models/all-minilm", "owner/not-in-the-cache"):
        with pytest.raises(
            L0MoEError, match="neither a folder nor in the local Hugging Face cache; download it first"
        ):
            find_model(name)


def test_incomplete_and_damaged_model(tmp_path: Path, tiny_encoder: Path) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(tiny_encoder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(L0MoEError, match=r"cannot be loaded .* download the model again"):
        load_encoder(str(folder), max_tokens=8, batch_size=2)
    weights.unlink()
    with pytest.raises(L0MoEError, match=r"lacks model\.safetensors; set data\.embedding_model"):
        load_encoder(str(folder), max_tokens=8, batch_size=2)


def test_pooling_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(L0MoEError, match=r"lacks 1_Pooling/config\.json"):
        pooling_method(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    file = tmp_path / "1_Pooling" / "config.json"
    file.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(L0MoEError, match="asks for pooling max_tokens"):
        pooling_method(tmp_path)
    file.write_text("{")
    with pytest.raises(L0MoEError, match=r"1_Pooling/config\.json is damaged .* download the model again"):
        pooling_method(tmp_path)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "include_prompt": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}, "mean"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean"),
        ({"embedding_dimension": 32, "pooling_mode": "mean", "include_prompt": True}, "mean"),
        ({"embedding_dimension": 32, "pooling_mode": ["cls"]}, "cls"),
        ({"embedding_dimension": 32, "pooling_mode": ["cls", "mean"]}, None),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, None),
        ({"pooling_mode": "weightedmean"}, None),
        ({"pooling_mode": "lasttoken", "pooling_mode_mean_tokens": True}, None),
        ({"word_embedding_dimension": 32}, None),
    ],
    ids=str,
)
def test_both_forms_of_pooling(tmp_path: Path, config: dict[str, object], method: str | None) -> None:
    """As sentence-transformers reads them; its newer form is one key."""
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps(config))
    if method:
        assert pooling_method(tmp_path) == method
        return
    with pytest.raises(L0MoEError, match=r"asks for pooling .*; FlagEmbedding pools by mean or cls"):
        pooling_method(tmp_path)


def modules(*kinds: str) -> list[dict[str, object]]:
    return [
        {
            "idx": n,
            "name": str(n),
            "path": f"{n}_{kind}" if n else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for n, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize(
    ("name", "content", "asked"),
    [
        (
            "modules.json",
            modules("Transformer", "Pooling", "Dense", "Normalize"),
            "the module Dense in modules",
        ),
        (
            "modules.json",
            modules("Transformer", "WeightedLayerPooling", "Pooling"),
            "the module WeightedLayer",
        ),
        (
            "config_sentence_transformers.json",
            {"prompts": {"d": "passage: "}, "default_prompt_name": "d"},
            "prompt 'd'",
        ),
        (
            "config_sentence_transformers.json",
            {"model_type": "SparseEncoder"},
            "a model of type SparseEncoder",
        ),
        ("sentence_bert_config.json", {"max_seq_length": 12, "do_lower_case": True}, "lower-cased text"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "the task fill-mask"),
        ("adapter_config.json", {}, "an adapter"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_flag_embedding_does_not_do(
    tmp_path: Path, tiny_encoder: Path, name: str, content: object, asked: str
) -> None:
    folder = Path(shutil.copytree(tiny_encoder, tmp_path / "encoder"))
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(
        L0MoEError, match=f"Encoder .* asks for .*{asked}.*, which FlagEmbedding does not do; choose"
    ):
        check_encoder(str(folder), max_tokens=12)


def test_what_a_folder_may_say(tmp_path: Path, tiny_encoder: Path) -> None:
    folder = Path(shutil.copytree(tiny_encoder, tmp_path / "encoder"))
    said: dict[str, object] = {
        "modules.json": modules("Transformer", "Pooling", "Normalize"),
        "config_sentence_transformers.json": {"prompts": {"query": "q: "}, "default_prompt_name": None},
        "sentence_bert_config.json": {"max_seq_length": 16, "do_lower_case": False},
    }
    for name, content in said.items():
        (folder / name).write_text(json.dumps(content))
    assert check_encoder(str(folder), max_tokens=16) == folder
    with pytest.raises(L0MoEError, match=r"embedding_max_tokens \(17\) is more than the 16 tokens"):
        check_encoder(str(folder), max_tokens=17)
    (folder / "modules.json").write_text("{}")
    with pytest.raises(L0MoEError, match=r"modules\.json holds no list; download"):
        check_encoder(str(folder), max_tokens=16)


@pytest.fixture
def shards(tmp_path: Path) -> tuple[list[Path], np.ndarray]:
    whole = np.random.default_rng(0).normal(size=(23, 4)).astype(np.float16)
    files = []
    for number, part in enumerate((whole[:7], whole[7:7], whole[7:20], whole[20:])):
        files.append(tmp_path / f"{number}.npy")
        np.save(files[-1], part)
    return files, whole


def test_rows_are_those_of_one_array(shards) -> None:
    files, whole = shards
    vectors = VectorShards(files)
    assert (vectors.shape, len(vectors)) == ((23, 4), 23)
    for wanted in (slice(0, 23), slice(5, 9), slice(20, 99), slice(3, 3), np.array([22, 0, 7, 7, 6])):
        assert vectors[wanted].dtype == np.float16
        np.testing.assert_array_equal(vectors[wanted], whole[wanted])


def test_selected_rows(shards) -> None:
    files, whole = shards
    rows = np.random.default_rng(1).permutation(23)[:15]
    vectors = VectorShards(files, rows)
    assert vectors.shape == (15, 4)
    np.testing.assert_array_equal(vectors[2:9], whole[rows[2:9]])
    np.testing.assert_array_equal(vectors[np.array([14, 0])], whole[rows[[14, 0]]])


def test_bad_files(shards, tmp_path: Path) -> None:
    files, _ = shards
    with pytest.raises(L0MoEError, match=r"none\.npy cannot be read"):
        VectorShards([tmp_path / "none.npy"])
    np.save(tmp_path / "other.npy", np.zeros((2, 5), dtype=np.float16))
    with pytest.raises(
        L0MoEError, match=r"other\.npy are float16 \[n, 5\], but .*0\.npy is float16 \[n, 4\]"
    ):
        VectorShards([*files, tmp_path / "other.npy"])
    np.save(tmp_path / "ints.npy", np.zeros((2, 4), dtype=np.int64))
    with pytest.raises(L0MoEError, match=r"ints\.npy are int64 \[2, 4\], not float16 or float32"):
        VectorShards([tmp_path / "ints.npy"])
    vectors = VectorShards(files)
    files[2].write_bytes(files[2].read_bytes()[:-8])
    vectors[:5]  # another file
    with pytest.raises(L0MoEError, match=r"2\.npy cannot be read"):
        vectors[8:9]

"""Tokens on disk: EOD rule, special tokens in text, cut documents, Megatron's reader gets back what was written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer

from megatron_l0moe.data.indexed import CorpusTokenizer, describe_shard, write_documents
from megatron_l0moe.data.manifest import sha256_file
from megatron_l0moe.errors import L0MoEError


@pytest.fixture
def model(tmp_path: Path, tiny_lm: Path) -> Path:
    return Path(shutil.copytree(tiny_lm, tmp_path / "model"))


def reference(folder: Path, text: str) -> list[int]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    return tokenizer.encode(text, add_special_tokens=False).ids


def rename_token(model: Path, old: str, new: str) -> None:
    file = model / "tokenizer.json"
    file.write_text(file.read_text().replace(old, new))


def test_encode_is_the_tokenizer_then_eod(model: Path) -> None:
    tokenizer = CorpusTokenizer.load(model)
    assert tokenizer.eod == 0  # <|endoftext|>, although config.json says 1
    assert tokenizer.vocab_size == 512
    assert tokenizer.sha256 == sha256_file(model / "tokenizer.json")
    text = "flour butter oven " * 9  # longer than the truncation that the file asks for
    assert tokenizer.encode([text], [10**6])[0].tolist() == [*reference(model, text), 0]


def test_special_tokens_in_a_text_are_text(model: Path) -> None:
    ids = CorpusTokenizer.load(model).encode(["say <|endoftext|> aloud"], [99])[0].tolist()
    assert ids.count(0) == 1
    assert ids[-1] == 0
    assert 0 in reference(model, "say <|endoftext|> aloud")  # control: the plain tokenizer does end there


@pytest.mark.parametrize("text", ["sail wind " * 5000, " " * 5000 + "sail " * 5000], ids=["words", "blanks"])
def test_a_long_text_is_cut_to_its_limit(model: Path, text: str) -> None:
    whole = reference(model, text)
    for limit in (1, 50, 700):
        assert CorpusTokenizer.load(model).encode([text], [limit])[0].tolist() == [*whole[:limit], 0]


@pytest.mark.parametrize(
    ("vocabulary", "eos", "eod"),
    [("<|end_of_text|>", 1, 0), ("</s>", 1, 0), ("<other>", 7, 7), ("<other>", [5, 6], 5)],
    ids=["llama3", "mistral", "config", "config list"],
)
def test_eod_rule(model: Path, vocabulary: str, eos: object, eod: int) -> None:
    rename_token(model, "<|endoftext|>", vocabulary)
    (model / "config.json").write_text(json.dumps({"vocab_size": 512, "eos_token_id": eos}))
    assert CorpusTokenizer.load(model).eod == eod


def test_bad_models(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"vocab_size": 300}))
    with pytest.raises(
        L0MoEError, match=r"has ids up to \d+, but the model's vocab_size is 300; it is not the"
    ):
        CorpusTokenizer.load(model)
    (model / "config.json").write_text(json.dumps({"hidden_size": 3}))
    with pytest.raises(L0MoEError, match="has no integer `vocab_size`"):
        CorpusTokenizer.load(model)
    rename_token(model, "<|endoftext|>", "<other>")
    (model / "config.json").write_text(json.dumps({"vocab_size": 512}))
    with pytest.raises(L0MoEError, match=r"No end-of-document token .* add eos_token_id to config\.json"):
        CorpusTokenizer.load(model)
    (model / "config.json").write_text(json.dumps({"vocab_size": 512, "eos_token_id": 512}))
    with pytest.raises(L0MoEError, match=r"id 512 is not below the model's vocab_size \(512\)"):
        CorpusTokenizer.load(model)
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(L0MoEError, match=r"tokenizer\.json or config\.json beside it is damaged"):
        CorpusTokenizer.load(model)
    (model / "tokenizer.json").unlink()
    with pytest.raises(L0MoEError, match=r"has no tokenizer\.json; set model\.path"):
        CorpusTokenizer.load(model)


def test_write_shard_round_trip(model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("megatron_l0moe.data.indexed.BATCH_DOCUMENTS", 2)
    tokenizer = CorpusTokenizer.load(model)
    texts = ["sail wind", "quark " * 30, "x", "oven dough"]
    prefix = tmp_path / "out" / "shard_00000"
    prefix.parent.mkdir()
    counted: list[int] = []
    written = write_documents(
        prefix, [(10 + i, t, 12) for i, t in enumerate(texts)], tokenizer, counted.append
    )
    ids, lengths = [i for i, _ in written], [length for _, length in written]
    assert counted == [2, 2]
    dataset = IndexedDataset(str(prefix))
    assert ids == [10, 11, 12, 13]
    assert [dataset[i].tolist() for i in range(4)] == [[*reference(model, t)[:12], 0] for t in texts]
    assert lengths == dataset.sequence_lengths.tolist()
    assert dataset.index.dtype == np.uint16
    assert sorted(p.name for p in prefix.parent.iterdir()) == ["shard_00000.bin", "shard_00000.idx"]
    shard = describe_shard(prefix, tmp_path)
    assert (shard.path, shard.documents, shard.tokens) == ("out/shard_00000", 4, sum(lengths))
    assert shard.bin_sha256 == sha256_file(Path(f"{prefix}.bin"))


def test_a_failed_write_is_seen(model: Path, tmp_path: Path, monkeypatch) -> None:
    """As on a full disk: the file is shorter than what was written."""
    monkeypatch.setattr("megatron_l0moe.data.indexed.DType.size", lambda key: 3)
    with pytest.raises(L0MoEError, match=r"does not hold what was written .* check the disk"):
        write_documents(tmp_path / "s", [(0, "sail", 9)], CorpusTokenizer.load(model), lambda count: None)


def test_added_tokens_beyond_the_model(model: Path) -> None:
    """Some tokenizers carry tokens that their model has no row for: refused only where a text uses one."""
    file = model / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens(["zeppelin"])
    tokenizer.save(str(file))
    (model / "config.json").write_text(json.dumps({"vocab_size": size}))
    loaded = CorpusTokenizer.load(model)
    loaded.encode(["flour butter"], [99])
    with pytest.raises(L0MoEError, match=rf"made the id {size}, but the model's vocab_size is {size}"):
        loaded.encode(["flour zeppelin"], [99])

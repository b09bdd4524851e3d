"""Tokens on disk: EOD rule, special tokens in text, cut documents, Megatron's reader gets back what was written."""

import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import AddedToken, Tokenizer, decoders

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.index.tokens import CorpusTokenizer, open_tokenizer, tokenizer_file, write_documents
from megatron_l0moe.runs.stage_folder import sha256_file


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
    [("<|end_of_text|>", 1, 0), ("</s>", 1, 0), ("<other>", 1, 1), ("<other>", [1, 6], 1)],
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
    with pytest.raises(L0MoEError, match=r"No end-of-document token .* set data\.eod to the id"):
        CorpusTokenizer.load(model)
    (model / "config.json").write_text(json.dumps({"vocab_size": 512, "eos_token_id": 512}))
    with pytest.raises(L0MoEError, match=r"id 512 is not below the model's vocab_size \(512\)"):
        CorpusTokenizer.load(model)
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(L0MoEError, match=r"tokenizer\.json is damaged \("):
        CorpusTokenizer.load(model)
    (model / "tokenizer.json").unlink()
    with pytest.raises(L0MoEError, match=r"has no tokenizer\.json or tokenizer\.model; set model\.path"):
        CorpusTokenizer.load(model)


@pytest.fixture
def sentencepiece_model(tmp_path: Path) -> Path:
    """A model folder as of Llama-2: a sentencepiece model with byte fallback, no tokenizer.json."""
    folder = tmp_path / "sentencepiece"
    folder.mkdir()
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["flour butter oven dough", "quark photon spin", "sail wind mast rope"] * 30),
        model_writer=model, model_type="bpe", vocab_size=320, byte_fallback=True, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "config.json").write_text(json.dumps({"vocab_size": 320}))
    return folder


def test_sentencepiece(sentencepiece_model: Path, tmp_path: Path) -> None:
    tokenizer = CorpusTokenizer.load(sentencepiece_model)
    reference = SentencePieceProcessor(model_file=str(sentencepiece_model / "tokenizer.model"))
    assert tokenizer.eod == reference.piece_to_id("</s>") == reference.eos_id()
    assert tokenizer.sha256 == sha256_file(sentencepiece_model / "tokenizer.model")
    texts = ["sail wind " * 40, "say </s> <s> aloud", "\u6c34 oven"]
    expected = [reference.encode(text) for text in texts]
    assert all(reference.eos_id() not in ids for ids in expected)  # a quoted end is text
    assert [ids.tolist() for ids in tokenizer.encode(texts, [999] * 3)] == [
        [*ids, tokenizer.eod] for ids in expected
    ]
    for limit in (1, 7, 60):
        assert tokenizer.encode(texts, [limit] * 3)[0].tolist() == [*expected[0][:limit], tokenizer.eod]
    write_documents(tmp_path / "s", enumerate_texts(texts), tokenizer, lambda count: None)
    stored = IndexedDataset(str(tmp_path / "s"))  # its arrays are views of a mapping that ends with it
    assert stored[1].tolist() == [*expected[1], tokenizer.eod]
    opened = open_tokenizer(sentencepiece_model / "tokenizer.model")
    assert opened.decode(reference.encode("sail wind")) == "sail wind"
    assert (opened.token_id("<nothing>"), opened.token(10**6)) == (None, None)


def enumerate_texts(texts: list[str]) -> list[tuple[int, str, int]]:
    return [(number, text, 10**6) for number, text in enumerate(texts)]


def test_bad_sentencepiece_models(sentencepiece_model: Path) -> None:
    (sentencepiece_model / "config.json").write_text(json.dumps({"vocab_size": 50}))
    with pytest.raises(
        L0MoEError, match=r"has ids up to \d+, but the model's vocab_size is 50; it is not the"
    ):
        CorpusTokenizer.load(sentencepiece_model)
    (sentencepiece_model / "tokenizer.model").write_bytes(b"IQ== 0\n")  # as Llama-3's own file of this name
    with pytest.raises(L0MoEError, match=r"tokenizer\.model is damaged or no sentencepiece model"):
        CorpusTokenizer.load(sentencepiece_model)


@pytest.mark.parametrize("kind", ["fast", "sentencepiece"])
def test_a_given_eod_is_checked(model: Path, sentencepiece_model: Path, kind: str) -> None:
    folder, special, size = (model, 1, 512) if kind == "fast" else (sentencepiece_model, 1, 320)
    plain = CorpusTokenizer.load(folder)
    tokenizer = CorpusTokenizer.load(folder, eod=special)
    assert (tokenizer.eod, plain.eod) == (special, 0 if kind == "fast" else 2)
    assert tokenizer.encode(["sail"], [9])[0].tolist() == [
        *plain.encode(["sail"], [9])[0].tolist()[:-1],
        special,
    ]
    word = int(plain.encode(["sail wind"], [9])[0][0])
    with pytest.raises(L0MoEError, match=rf"data\.eod \({word}\) is '.*' in .*, which a text can hold too"):
        CorpusTokenizer.load(folder, eod=word)
    with pytest.raises(
        L0MoEError, match=rf"id {size} is not below the model's vocab_size .* correct data\.eod"
    ):
        CorpusTokenizer.load(folder, eod=size)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 10**5}))
    with pytest.raises(
        L0MoEError, match=r"data\.eod \(99999\) is no token of .*; set it to the id of a special"
    ):
        CorpusTokenizer.load(folder, eod=99999)


@pytest.mark.parametrize("kind", ["fast", "sentencepiece"])
def test_a_document_of_special_tokens_only(
    model: Path, sentencepiece_model: Path, tmp_path: Path, kind: str
) -> None:
    """It is text like any other: it ends once, and comes back from its tokens."""
    folder = model if kind == "fast" else sentencepiece_model
    tokenizer = CorpusTokenizer.load(folder)
    text = "<|endoftext|><|im_end|></s><s><unk><pad>" * 3
    write_documents(tmp_path / "s", enumerate_texts([text, " \n", "sail"]), tokenizer, lambda count: None)
    stored = IndexedDataset(str(tmp_path / "s"))
    for document in stored:
        assert document.tolist().count(tokenizer.eod) == 1
        assert document[-1] == tokenizer.eod
    opened = open_tokenizer(tokenizer_file(folder))
    ids = stored[0].tolist()[:-1]
    # The toy tokenizer.json has no decoder, but its tokens are the text's own characters.
    assert (
        opened.decode(ids) if kind == "sentencepiece" else "".join(map(str, map(opened.token, ids)))
    ) == text


def test_a_text_of_200_megabytes_costs_its_limit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = CorpusTokenizer.load(model)
    given: list[int] = []
    encode = tokenizer._tokenizer.encode

    def counted(texts: list[str]) -> list[list[int]]:
        given.extend(len(text) for text in texts)
        return encode(texts)

    monkeypatch.setattr(tokenizer._tokenizer, "encode", counted)
    ids = tokenizer.encode(["sail wind " * 20_000_000], [100])[0]
    assert ids.tolist() == [*reference(model, "sail wind " * 60)[:100], 0]
    assert sum(given) < 10_000


@pytest.mark.parametrize("kind", ["fast", "sentencepiece"])
def test_a_pickled_tokenizer_is_the_same(model: Path, sentencepiece_model: Path, kind: str) -> None:
    """As an executor sends it to its workers; the library's own pickle takes special tokens in a text for special."""
    tokenizer = CorpusTokenizer.load(model if kind == "fast" else sentencepiece_model)
    again = pickle.loads(pickle.dumps(tokenizer))
    text = "say <|endoftext|></s> aloud " * 3
    assert again.encode([text], [99])[0].tolist() == tokenizer.encode([text], [99])[0].tolist()
    assert (again.eod, again.vocab_size, again.sha256) == (
        tokenizer.eod,
        tokenizer.vocab_size,
        tokenizer.sha256,
    )


def test_write_shard_round_trip(model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("megatron_l0moe.index.tokens.BATCH_DOCUMENTS", 2)
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


def test_a_failed_write_is_seen(model: Path, tmp_path: Path, monkeypatch) -> None:
    """As on a full disk: the file is shorter than what was written."""
    monkeypatch.setattr("megatron_l0moe.index.tokens.DType.size", lambda key: 3)
    with pytest.raises(L0MoEError, match=r"does not hold what was written .* check the disk"):
        write_documents(tmp_path / "s", [(0, "sail", 9)], CorpusTokenizer.load(model), lambda count: None)


@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_beyond_the_model(model: Path, special: bool) -> None:
    """The model has no row for them: said at once, not where the first text holds one."""
    file = model / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    size = tokenizer.get_vocab_size()
    (model / "config.json").write_text(json.dumps({"vocab_size": size}))
    CorpusTokenizer.load(model)  # control
    tokenizer.add_tokens([AddedToken("zeppelin", special=special), "airship"])
    tokenizer.save(str(file))
    with pytest.raises(
        L0MoEError, match=rf"ids up to {size + 1}, but .* as 'zeppelin' \({size}\) were added"
    ):
        CorpusTokenizer.load(model)


def test_a_guessed_eod_is_held_to_the_same(model: Path) -> None:
    """Fine-tunes that were saved again hold <|endoftext|> as an added token that is not special."""
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    (end,) = [token for token in content["added_tokens"] if token["content"] == "<|endoftext|>"]
    end["special"] = False
    file.write_text(json.dumps(content))
    opened = open_tokenizer(file)
    assert 0 in opened.encode(["say <|endoftext|> aloud"])[0]  # why it is refused
    with pytest.raises(
        L0MoEError, match=r"token of .*, '<\|endoftext\|>' \(0\), is not special in tokenizer\.json"
    ):
        CorpusTokenizer.load(model)
    assert CorpusTokenizer.load(model, eod=1).eod == 1
    rename_token(model, "<|endoftext|>", "<other>")
    for eos, problem in (
        (5, "is not special in"),
        (450, r"eos_token_id \(450\) of .*config\.json is no token of"),
    ):
        (model / "config.json").write_text(json.dumps({"vocab_size": 512, "eos_token_id": eos}))
        with pytest.raises(L0MoEError, match=problem):
            CorpusTokenizer.load(model)


def test_a_part_of_a_character_is_no_end(model: Path) -> None:
    """Decoded alone it is the replacement character, which is encoded as others."""
    file = model / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(file))
    number = tokenizer.token_to_id("\u00e6")  # the byte e6 of byte-level BPE
    assert number not in tokenizer.encode(tokenizer.decode([number])).ids
    with pytest.raises(L0MoEError, match=rf"data\.eod \({number}\) is .* which a text can hold too"):
        CorpusTokenizer.load(model, eod=number)

"""Tokens on disk: texts to Megatron's .bin/.idx with Megatron's own builder, one document per text plus EOD.

Base models come with one of two kinds of tokenizer files: tokenizer.json, and sentencepiece's tokenizer.model. Both are
used for text only: no special token is added, and none is recognised, since a document that quotes "<|endoftext|>"
must not end there.
"""

from collections.abc import Callable, Iterable
from itertools import batched
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs.stage_folder import sha256_file
from megatron_l0moe.runtime.json_files import read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
"""File names in the order of preference: a model that has both is used with the first, as transformers does."""


class TextTokenizer(Protocol):
    """What curation asks of a tokenizer."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, special tokens by their names."""

    def token_id(self, token: str) -> int | None:
        """Return the id of a token, None if there is no such token."""

    def token(self, number: int) -> str | None:
        """Return the token of an id, None if there is no such id."""

    def highest(self) -> int:
        """Return the highest id, added tokens included."""

    def is_special(self, number: int) -> bool:
        """Say whether an id is that of a special token, whose name in a text is taken for text."""


class FastTokenizer:
    """A tokenizer of the tokenizers library, from tokenizer.json."""

    def __init__(self, file: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(file))
        self._text_only()

    def __getstate__(self) -> str:
        return str(self._tokenizer.to_str())

    def __setstate__(self, state: str) -> None:
        self._tokenizer = Tokenizer.from_str(state)
        self._text_only()  # a pickled Tokenizer forgets encode_special_tokens

    def _text_only(self) -> None:
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text; without offsets, which cost a third of the time."""
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, special tokens by their names."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def token_id(self, token: str) -> int | None:
        """Return the id of a token, None if there is no such token."""
        number = self._tokenizer.token_to_id(token)
        return None if number is None else int(number)

    def token(self, number: int) -> str | None:
        """Return the token of an id, None if there is no such id."""
        token = self._tokenizer.id_to_token(number)
        return None if token is None else str(token)

    def highest(self) -> int:
        """Return the highest id, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=0)

    def is_special(self, number: int) -> bool:
        """Say whether an id is that of a special token; an added one need not be special."""
        added = self._tokenizer.get_added_tokens_decoder().get(number)
        return added is not None and bool(added.special)


class SentencePieceTokenizer:
    """A sentencepiece model, from tokenizer.model; it takes control symbols in a text for text."""

    def __init__(self, file: Path) -> None:
        self._model = SentencePieceProcessor(model_file=str(file))

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text."""
        ids: list[list[int]] = self._model.encode(texts, out_type=int)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids; control symbols have none."""
        return str(self._model.decode(ids))

    def token_id(self, token: str) -> int | None:
        """Return the id of a token, None if there is no such token."""
        number = int(self._model.piece_to_id(token))
        return number if self._model.id_to_piece(number) == token else None

    def token(self, number: int) -> str | None:
        """Return the token of an id, None if there is no such id."""
        return str(self._model.id_to_piece(number)) if 0 <= number <= self.highest() else None

    def highest(self) -> int:
        """Return the highest id."""
        return int(self._model.get_piece_size()) - 1

    def is_special(self, number: int) -> bool:
        """Say whether an id is that of a control symbol."""
        return bool(self._model.is_control(number))


def tokenizer_file(folder: Path) -> Path:
    """Return the tokenizer file of a Hugging Face model folder."""
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise L0MoEError(
        f"Model folder {folder} has no {' or '.join(TOKENIZER_FILES)}; set model.path to a complete Hugging Face "
        "checkpoint."
    )


def open_tokenizer(file: Path) -> TextTokenizer:
    """Open a tokenizer.json or a sentencepiece model."""
    kind = FastTokenizer if file.suffix == ".json" else SentencePieceTokenizer
    try:
        return kind(file)
    except Exception as error:  # tokenizers raises a bare Exception
        other = "" if file.suffix == ".json" else " or no sentencepiece model"
        raise L0MoEError(
            f"{file} is damaged{other} ({' '.join(str(error).split())}); copy the model again."
        ) from error


EOD_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>")
"""End-of-document tokens by preference. A chat model's eos_token_id ends a turn, not a document: it is asked last."""
BATCH_DOCUMENTS = 64
CHARS_PER_TOKEN = 8
CUT_MARGIN = 16
"""Tokens before an artificial cut that could differ from those of the whole text."""

Tokens = npt.NDArray[np.int64]


class CorpusTokenizer:
    """The base model's tokenizer, used for text only: no special token is added or recognised."""

    def __init__(self, tokenizer: TextTokenizer, *, eod: int, vocab_size: int, sha256: str) -> None:
        self._tokenizer = tokenizer
        self.eod = eod
        self.vocab_size = vocab_size
        """The size in the model's config, which may be larger than the tokenizer's."""
        self.sha256 = sha256

    @classmethod
    def load(cls, model: Path, *, eod: int | None = None) -> "CorpusTokenizer":
        """Load the tokenizer (tokenizer.json or tokenizer.model) and `config.json` of a Hugging Face model folder.

        Args:
            model: the folder.
            eod: id that ends a document; None: see ``EOD_TOKENS``.

        Raises:
            L0MoEError: a file is missing or damaged, no end-of-document token can be found, or the given one does
                not fit tokenizer and model.
        """
        file = tokenizer_file(model)
        tokenizer, config = open_tokenizer(file), _read_config(model / "config.json")
        vocab_size = config.get("vocab_size")
        if not isinstance(vocab_size, int):
            raise L0MoEError(
                f"{model / 'config.json'} has no integer `vocab_size`; set model.path to a causal LM checkpoint."
            )
        beyond = [n for n in range(vocab_size, tokenizer.highest() + 1) if tokenizer.token(n) is not None]
        if beyond:
            raise L0MoEError(
                f"The tokenizer in {model} has ids up to {beyond[-1]}, but the model's vocab_size is {vocab_size}; it "
                f"is not the tokenizer of the model, or tokens such as {tokenizer.token(beyond[0])!r} ({beyond[0]}) "
                "were added to it, for which the model has no rows: remove them."
            )
        found = _find_eod(tokenizer, config, model) if eod is None else eod
        if found >= vocab_size:
            raise L0MoEError(
                f"The end-of-document id {found} is not below the model's vocab_size ({vocab_size}); "
                + (
                    f"the tokenizer in {model} is not that of the model."
                    if eod is None
                    else "correct data.eod."
                )
            )
        _check_eod(tokenizer, found, file, guessed=eod is None)
        return cls(tokenizer, eod=found, vocab_size=vocab_size, sha256=sha256_file(file))

    def encode(self, texts: list[str], limits: list[int]) -> list[Tokens]:
        """Return each text's tokens, then EOD; a text of more than its limit of tokens is cut there, then EOD.

        The text is cut by characters first, so the cost is that of the limit, not of the text.

        Raises:
            L0MoEError: an id is not below the model's vocabulary size.
        """
        limited = list(zip(texts, limits, strict=True))
        heads = [text[: limit * CHARS_PER_TOKEN] for text, limit in limited]
        tokens = []
        for (text, limit), ids in zip(limited, self._tokenizer.encode(heads), strict=True):
            chars = limit * CHARS_PER_TOKEN
            while chars < len(text) and len(ids) < limit + CUT_MARGIN:
                chars *= 2
                (ids,) = self._tokenizer.encode([text[:chars]])
            tokens.append(np.array([*ids[:limit], self.eod], dtype=np.int64))
        highest = max((int(ids.max()) for ids in tokens), default=0)
        if highest >= self.vocab_size:
            raise L0MoEError(
                f"The tokenizer made the id {highest}, but the model's vocab_size is {self.vocab_size}; the tokenizer "
                "in model.path is not that of the model."
            )
        return tokens


def write_documents(
    prefix: Path,
    documents: Iterable[tuple[int, str, int]],
    tokenizer: CorpusTokenizer,
    advance: Callable[[int], None],
) -> list[tuple[int, int]]:
    """Tokenise (id, text, token limit) triples into ``prefix``.bin/.idx; return (id, length with EOD), as stored.

    The pair is read back. A name for a file that is not whole yet is the caller's part.
    """
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    written: list[tuple[int, int]] = []
    last = np.empty(0, dtype=np.int64)
    for batch in batched(documents, BATCH_DOCUMENTS):
        encoded = tokenizer.encode([text for _, text, _ in batch], [limit for _, _, limit in batch])
        for (document, _, _), tokens in zip(batch, encoded, strict=True):
            builder.add_document(torch.from_numpy(tokens), [len(tokens)])
            written.append((document, len(tokens)))
            last = tokens
        advance(len(batch))
    builder.finalize(f"{prefix}.idx")
    _read_back(prefix, [length for _, length in written], last)
    return written


def _read_back(prefix: Path, lengths: list[int], last: Tokens) -> None:
    """Check with Megatron's reader what its builder wrote: all lengths, the file size, the last document."""
    dataset = IndexedDataset(str(prefix))
    size = Path(f"{prefix}.bin").stat().st_size
    whole = (
        len(dataset) == len(lengths)
        and np.array_equal(dataset.sequence_lengths, lengths)
        and size == sum(lengths) * DType.size(dataset.index.dtype)
        and (not lengths or np.array_equal(dataset[len(lengths) - 1], last))
    )
    if not whole:
        raise L0MoEError(
            f"{prefix}.bin does not hold what was written ({size} bytes for {sum(lengths)} tokens); check the disk "
            "and start curate again."
        )


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise L0MoEError(
            f"Model folder {file.parent} has no config.json; set model.path to a complete Hugging Face checkpoint."
        )
    return read_json(file, "copy the model again", finite=False)


def _find_eod(tokenizer: TextTokenizer, config: dict[str, object], model: Path) -> int:
    for token in EOD_TOKENS:
        if (number := tokenizer.token_id(token)) is not None:
            return number
    eos = config.get("eos_token_id")
    first = eos[0] if isinstance(eos, list) and eos else eos
    if isinstance(first, int):
        return first
    raise L0MoEError(
        f"No end-of-document token in {model}: its vocabulary has none of {', '.join(EOD_TOKENS)} and config.json no "
        "eos_token_id; set data.eod to the id of the token that ends a document."
    )


def _check_eod(tokenizer: TextTokenizer, eod: int, file: Path, *, guessed: bool) -> None:
    """Refuse an id that is no token, or that a text can hold, so that it would not tell where a document ends."""
    token = tokenizer.token(eod)
    advice = "set data.eod to the id of a special token" if guessed else "set it to the id of a special token"
    if token is None:
        asked = f"eos_token_id ({eod}) of {file.parent / 'config.json'}" if guessed else f"data.eod ({eod})"
        raise L0MoEError(f"{asked} is no token of {file}; {advice}.")
    if not _can_stand_in_text(tokenizer, eod):
        return
    if guessed:
        raise L0MoEError(
            f"The end-of-document token of {file.parent}, {token!r} ({eod}), is not special in {file.name}, so that a "
            f'text can hold it too; mark it there as the base model does ("special": true), or {advice}.'
        )
    raise L0MoEError(f"data.eod ({eod}) is {token!r} in {file}, which a text can hold too; {advice}.")


def _can_stand_in_text(tokenizer: TextTokenizer, number: int) -> bool:
    text = tokenizer.decode([number])
    if "\ufffd" in text and not tokenizer.is_special(number):  # a piece of a character: no text is it alone
        return True
    return any(number in ids for ids in tokenizer.encode([text, f" {text}", f"x{text}x"]))

"""The two kinds of tokenizer files that base models come with: tokenizer.json and sentencepiece's tokenizer.model.

Both are used for text only: no special token is added, and none is recognised, since a document that quotes
"<|endoftext|>" must not end there.
"""

from pathlib import Path
from typing import Protocol

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from megatron_l0moe.errors import L0MoEError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
"""By preference: a model that has both is used with the first, as transformers does."""


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
    """Return the tokenizer file of a Hugging Face model folder.

    Raises:
        L0MoEError: it has none.
    """
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise L0MoEError(
        f"Model folder {folder} has no {' or '.join(TOKENIZER_FILES)}; set model.path to a complete Hugging Face "
        "checkpoint."
    )


def open_tokenizer(file: Path) -> TextTokenizer:
    """Open a tokenizer.json or a sentencepiece model.

    Raises:
        L0MoEError: it is damaged, or of another kind.
    """
    kind = FastTokenizer if file.suffix == ".json" else SentencePieceTokenizer
    try:
        return kind(file)
    except Exception as error:  # tokenizers raises a bare Exception
        other = "" if file.suffix == ".json" else " or no sentencepiece model"
        raise L0MoEError(
            f"{file} is damaged{other} ({' '.join(str(error).split())}); copy the model again."
        ) from error

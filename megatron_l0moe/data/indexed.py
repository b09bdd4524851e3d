"""Tokens on disk: texts to Megatron's .bin/.idx with Megatron's own builder, one document per text plus EOD."""

import json
from collections.abc import Callable, Iterable
from itertools import batched
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from tokenizers import Tokenizer

from megatron_l0moe.data.index import Shard
from megatron_l0moe.data.manifest import sha256_file
from megatron_l0moe.errors import L0MoEError

EOD_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>")
"""End-of-document tokens by preference. A chat model's eos_token_id ends a turn, not a document: it is asked last."""
BATCH_DOCUMENTS = 64
CHARS_PER_TOKEN = 8
CUT_MARGIN = 16
"""Tokens before an artificial cut that could differ from those of the whole text."""

Tokens = npt.NDArray[np.int64]


class CorpusTokenizer:
    """The base model's fast tokenizer, used for text only: no special token is added or recognised."""

    def __init__(self, tokenizer: Tokenizer, *, eod: int, vocab_size: int, sha256: str) -> None:
        self._tokenizer = tokenizer
        self.eod = eod
        self.vocab_size = vocab_size
        """Of the model's config, which may be larger than the tokenizer's."""
        self.sha256 = sha256
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # A document that quotes "<|endoftext|>" must not end there.
        tokenizer.encode_special_tokens = True

    @classmethod
    def load(cls, model: Path) -> "CorpusTokenizer":
        """Load `tokenizer.json` and `config.json` of a Hugging Face model folder.

        Raises:
            L0MoEError: a file is missing or damaged, or no end-of-document token can be found.
        """
        file, config_file = model / "tokenizer.json", model / "config.json"
        for path in (file, config_file):
            if not path.is_file():
                raise L0MoEError(
                    f"Model folder {model} has no {path.name}; set model.path to a complete Hugging Face checkpoint "
                    "with a fast tokenizer."
                )
        try:
            tokenizer = Tokenizer.from_file(str(file))
            config = json.loads(config_file.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises a bare Exception
            raise L0MoEError(
                f"{file} or config.json beside it is damaged ({error}); copy the model again."
            ) from error
        vocab_size = config.get("vocab_size")
        if not isinstance(vocab_size, int):
            raise L0MoEError(
                f"{config_file} has no integer `vocab_size`; set model.path to a causal LM checkpoint."
            )
        highest = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
        if highest >= vocab_size:
            raise L0MoEError(
                f"The tokenizer in {model} has ids up to {highest}, but the model's vocab_size is {vocab_size}; it is "
                "not the tokenizer of the model."
            )
        eod = _find_eod(tokenizer, config, model)
        if eod >= vocab_size:
            raise L0MoEError(
                f"The end-of-document id {eod} is not below the model's vocab_size ({vocab_size}); the tokenizer in "
                f"{model} is not that of the model."
            )
        return cls(tokenizer, eod=eod, vocab_size=vocab_size, sha256=sha256_file(file))

    def encode(self, texts: list[str], limits: list[int]) -> list[Tokens]:
        """Return each text's tokens, then EOD; a text of more than its limit of tokens is cut there, then EOD.

        The text is cut by characters first, so the cost is that of the limit, not of the text.

        Raises:
            L0MoEError: an id is not below the model's vocabulary size.
        """
        limited = list(zip(texts, limits, strict=True))
        heads = [text[: limit * CHARS_PER_TOKEN] for text, limit in limited]
        encodings = self._tokenizer.encode_batch_fast(heads, add_special_tokens=False)
        tokens = []
        for (text, limit), encoding in zip(limited, encodings, strict=True):
            ids, chars = encoding.ids, limit * CHARS_PER_TOKEN
            while chars < len(text) and len(ids) < limit + CUT_MARGIN:
                chars *= 2
                ids = self._tokenizer.encode(text[:chars], add_special_tokens=False).ids
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

    Raises:
        L0MoEError: the files do not hold what was written.
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


def describe_shard(prefix: Path, folder: Path) -> Shard:
    """Return the checksums and sizes of a shard, with its path relative to ``folder``."""
    dataset = IndexedDataset(str(prefix))
    return Shard(
        path=prefix.relative_to(folder).as_posix(),
        bin_sha256=sha256_file(Path(f"{prefix}.bin")),
        idx_sha256=sha256_file(Path(f"{prefix}.idx")),
        documents=len(dataset),
        tokens=int(dataset.sequence_lengths.sum(dtype=np.int64)),
    )


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


def _find_eod(tokenizer: Tokenizer, config: dict[str, object], model: Path) -> int:
    for token in EOD_TOKENS:
        if (number := tokenizer.token_to_id(token)) is not None:
            return int(number)
    eos = config.get("eos_token_id")
    first = eos[0] if isinstance(eos, list) and eos else eos
    if isinstance(first, int):
        return first
    raise L0MoEError(
        f"No end-of-document token in {model}: its vocabulary has none of {', '.join(EOD_TOKENS)} and config.json no "
        "eos_token_id; add eos_token_id to config.json."
    )

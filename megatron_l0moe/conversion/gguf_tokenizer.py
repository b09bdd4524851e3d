"""The tokenizer in a GGUF header as tokenizer.json: byte-level BPE ('gpt2') and sentencepiece's BPE ('llama').

llama.cpp's names of word splittings and its defaults: https://github.com/ggml-org/llama.cpp, src/llama-vocab.cpp.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runs.stage_folder import write_text

SPACE = "\u2581"  # sentencepiece's
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PROBES = (
    *(
        "The quick brown fox",
        " leading space",
        "  two  spaces ",
        "line\n\nnext\tend\r\n",
        "mast 1234 keel 007",
    ),
    *(
        "\u65e5\u672c\u8a9e \u00fcn\u00ef \U0001f600",
        "def f(x):\n    return x**2  # 3.14",
        "don't I'll",
        "x" * 40,
    ),
)
"""Texts that are encoded and decoded before a tokenizer counts as read."""
_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # ours -> llama.cpp's
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unk": 0}  # llama.cpp's defaults


@dataclass(frozen=True, kw_only=True)
class GGUFTokenizer:
    """A tokenizer that has passed its round trips, with what lies beside it."""

    tokenizer: Tokenizer
    special: dict[str, str]
    """`bos_token` and so on, as in tokenizer_config.json."""
    ids: dict[str, int | None]
    """`bos_token_id` and so on, as in config.json."""
    chat_templates: dict[str, str]
    """Templates by name; `default` is the one that the model is used with."""

    def save(self, out: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat templates."""
        write_text(out / "tokenizer.json", self.tokenizer.to_str(pretty=True))
        # The name that transformers 4 and 5 both know for "as tokenizer.json says".
        settings = {
            **self.special,
            "model_max_length": int(1e30),
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        write_text(
            out / "tokenizer_config.json",
            json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n",
        )
        for name, text in self.chat_templates.items():
            default = name == "default"
            folder = out if default else out / "additional_chat_templates"
            write_text(folder / f"{'chat_template' if default else name}.jinja", text)


def tokenizer_of(fields: dict[str, Any], path: Path, vocab_size: int) -> GGUFTokenizer:
    """Make the tokenizer that a header describes, and compare texts before and after it.

    Args:
        fields: of the header.
        path: named in messages.
        vocab_size: rows of the embedding.

    Raises:
        L0MoEError: a kind of tokenizer that is not supported, a list that is missing or too short, a text that does
            not come back or that sentencepiece itself encodes in another way.
    """
    tokens = _list(fields, "tokens", str, path)
    kinds = _list(fields, "token_type", int, path)
    if not len(tokens) == len(kinds) == vocab_size or len(set(tokens)) != vocab_size:
        raise L0MoEError(
            f"{path} lists {len(set(tokens))} different tokens and {len(kinds)} token types, but its embedding has "
            f"{vocab_size} rows; download it again."
        )
    ids = _ids(fields, path, vocab_size)
    kind = fields.get("tokenizer.ggml.model")
    try:
        if kind == "gpt2":
            tokenizer = _byte_level(fields, tokens, path)
        elif kind == "llama":
            tokenizer = _sentencepiece(fields, tokens, kinds, path)
        else:
            raise L0MoEError(
                f"{path}: a tokenizer of the kind {kind!r} is not supported; supported are gpt2, llama: use the "
                "model's Hugging Face checkpoint instead."
            )
        _add_tokens(tokenizer, tokens, kinds)
        tokenizer.post_processor = _frame(fields, tokens, ids, path)
    except L0MoEError:
        raise
    except Exception as error:  # tokenizers raises a bare Exception
        reason = " ".join(str(error).split())
        raise L0MoEError(f"{path}: its tokenizer is damaged ({reason}); download it again.") from error
    _check_round_trips(tokenizer, path)
    special = {f"{ours}_token": tokens[number] for ours, number in ids.items() if number is not None}
    return GGUFTokenizer(
        tokenizer=tokenizer,
        special=special,
        ids={f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad")},
        chat_templates=_chat_templates(fields, path),
    )


def _byte_level(fields: dict[str, Any], tokens: list[str], path: Path) -> Tokenizer:
    pre = fields.get("tokenizer.ggml.pre")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    qwen2 = Regex(_LLAMA3_PATTERN.replace("{1,3}", ""))
    splitting = {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
        "llama-bpe": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(_LLAMA3_PATTERN), "isolated"), bytes_only]
        ),
        "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(qwen2, "isolated"), bytes_only]),
    }
    if pre not in splitting:
        raise L0MoEError(
            f"{path}: the tokenizer's word splitting {pre!r} is not supported; supported are "
            f"{', '.join(sorted(splitting))}: use the model's Hugging Face checkpoint instead."
        )
    if fields.get("tokenizer.ggml.add_space_prefix", False):
        raise L0MoEError(
            f"{path} sets tokenizer.ggml.add_space_prefix for a byte-level BPE, which is not supported."
        )
    merges = [tuple(merge.split(" ")) for merge in _list(fields, "merges", str, path)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    # Llama-3 takes a whole word that is a token before any merge.
    bpe = models.BPE(
        vocab=vocabulary,
        merges=merges,
        ignore_merges=pre == "llama-bpe",
        continuing_subword_prefix="",
        end_of_word_suffix="",
    )
    tokenizer = Tokenizer(bpe)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitting[pre]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: dict[str, Any], tokens: list[str], kinds: list[int], path: Path) -> Tokenizer:
    """Return a BPE whose merges have the order of sentencepiece's scores, after a comparison with sentencepiece."""
    for key in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if fields.get(f"tokenizer.ggml.{key}"):
            raise L0MoEError(f"{path} sets tokenizer.ggml.{key}, which is not supported.")
    scores = _list(fields, "scores", float, path)
    if len(scores) != len(tokens):
        raise L0MoEError(f"{path} has {len(scores)} scores for {len(tokens)} tokens; download it again.")
    unknown = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.UNKNOWN]
    if len(unknown) != 1:
        raise L0MoEError(f"{path} has {len(unknown)} tokens for what is unknown, but must have 1.")
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    numbers = {token: number for number, token in enumerate(tokens)}
    normal = {token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.NORMAL}
    bpe = models.BPE(
        vocab=numbers,
        merges=_merges(normal, numbers, scores),
        unk_token=unknown[0],
        fuse_unk=True,
        byte_fallback=TokenType.BYTE in kinds,
    )
    tokenizer = Tokenizer(bpe)
    spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE)] * prefix + spaces)
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _compare_with_sentencepiece(tokenizer, tokens, kinds, scores, prefix, path)
    return tokenizer


def _merges(normal: set[str], numbers: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Return every way to put a piece together from two others, the piece of the highest score first."""
    found = []
    for piece in normal:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                order = (-scores[numbers[piece]], numbers[piece], numbers[left], numbers[right])
                found.append((order, (left, right)))
    return [pair for _, pair in sorted(found)]


def _compare_with_sentencepiece(
    tokenizer: Tokenizer, tokens: list[str], kinds: list[int], scores: list[float], prefix: bool, path: Path
) -> None:
    """Encode texts with sentencepiece itself too, of the same pieces."""
    model = sentencepiece_model_pb2.ModelProto()
    for token, kind, score in zip(tokens, kinds, scores, strict=True):
        model.pieces.add(piece=token, score=score, type=int(kind))
    model.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = TokenType.BYTE in kinds
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    reference = SentencePieceProcessor(model_proto=model.SerializeToString())
    for text in (*PROBES, " ".join(piece.replace(SPACE, " ") for piece in tokens[::17])):
        if tokenizer.encode(text, add_special_tokens=False).ids != reference.encode(text):
            raise L0MoEError(
                f"{path}: its sentencepiece model encodes {text[:40]!r} in a way that tokenizer.json cannot express; "
                "use the model's Hugging Face checkpoint instead."
            )


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    """Let control tokens be special, and tokens that users defined be found before any merge."""
    for wanted, special in (
        (TokenType.CONTROL, True),
        (TokenType.UNKNOWN, True),
        (TokenType.USER_DEFINED, False),
    ):
        chosen = [
            AddedToken(token, special=special, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == wanted and token
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(chosen)


def _frame(fields: dict[str, Any], tokens: list[str], ids: dict[str, int | None], path: Path) -> Any:
    """Return the post-processor that puts the tokens of begin and end around a text, where the model has them."""
    spm_or_llama3 = (
        fields.get("tokenizer.ggml.model") == "llama" or fields.get("tokenizer.ggml.pre") == "llama-bpe"
    )
    wanted = {
        "bos": fields.get("tokenizer.ggml.add_bos_token", spm_or_llama3),
        "eos": fields.get("tokenizer.ggml.add_eos_token", False),
    }
    special: list[tuple[str, int]] = []
    around = {"bos": "", "eos": ""}
    for name, add in wanted.items():
        number = ids[name]
        if add and number is None:
            raise L0MoEError(f"{path} sets add_{name}_token, but has no {name}_token_id; download it again.")
        if add and number is not None:
            special.append((tokens[number], number))
            around[name] = tokens[number]
    one, two = (" ".join(filter(None, (around["bos"], part, around["eos"]))) for part in ("$A:0", "$B:1"))
    second = " ".join(
        f"{word}:1" if word in (around["bos"], around["eos"]) else word for word in two.split(" ")
    )
    return processors.TemplateProcessing(single=one, pair=f"{one} {second}", special_tokens=special)


def _check_round_trips(tokenizer: Tokenizer, path: Path) -> None:
    for text in PROBES:
        got = tokenizer.decode(
            tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False
        )
        if got != text:
            raise L0MoEError(
                f"{path}: its tokenizer makes {got[:40]!r} of {text[:40]!r}; use the model's Hugging Face checkpoint "
                "instead."
            )


def _chat_templates(fields: dict[str, Any], path: Path) -> dict[str, str]:
    key = "tokenizer.chat_template"
    found = {"default": fields[key]} if key in fields else {}
    found |= {
        name.removeprefix(f"{key}."): text for name, text in fields.items() if name.startswith(f"{key}.")
    }
    for name, text in found.items():
        if not isinstance(text, str) or not name.replace("_", "").replace("-", "").isalnum():
            raise L0MoEError(f"{path}: the chat template {name[:40]!r} is no text or has no plain name.")
    return found


def _ids(fields: dict[str, Any], path: Path, vocab_size: int) -> dict[str, int | None]:
    ids: dict[str, int | None] = {}
    for ours, theirs in _IDS.items():
        default = _SENTENCEPIECE_IDS.get(ours) if fields.get("tokenizer.ggml.model") == "llama" else None
        number = fields.get(f"tokenizer.ggml.{theirs}_token_id", default)
        if number is not None and (type(number) is not int or not 0 <= number < vocab_size):
            raise L0MoEError(
                f"{path}: tokenizer.ggml.{theirs}_token_id must be below {vocab_size}, got {str(number)[:40]}."
            )
        ids[ours] = number
    return ids


def _list(fields: dict[str, Any], key: str, kind: type, path: Path) -> list[Any]:
    values = fields.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise L0MoEError(f"{path} has no list tokenizer.ggml.{key} of its tokenizer; download it again.")
    return values

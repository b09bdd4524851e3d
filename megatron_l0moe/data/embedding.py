"""Semantic vectors of documents through FlagEmbedding: BGE-M3 (the paper's encoder) or any BERT-like encoder.

Shape letters: N = documents, V = embedding dimension. Nothing here uses the network: a model is a folder, or a
Hub name that already lies in the local Hugging Face cache.
"""

import contextlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runtime.cpu import device

logger = logging.getLogger(__name__)

HEAD_CHARS_PER_TOKEN = 16
"""Characters of a text that are given to the tokenizer, per token that is embedded: about four times what
ordinary text needs, so that a text of 200 MB costs no more than a page."""
CHUNK_DOCUMENTS = 2048
"""Documents that are sorted by length and embedded together; bounds the memory for texts."""


class Encoder:
    """A sentence encoder; `embed_chunks` gives unit vectors."""

    def __init__(self, model: Any, *, max_tokens: int, batch_size: int) -> None:
        self._model = model
        self._max_tokens = max_tokens
        self._batch_size = batch_size

    @property
    def head_chars(self) -> int:
        """Characters of a text that are looked at."""
        return self._max_tokens * HEAD_CHARS_PER_TOKEN

    def embed_chunks(
        self, texts: Iterable[str], advance: Callable[[int], None]
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the vectors of some texts at a time, in their order, float32 [N, V] with rows of length 1.

        Only the first tokens of a text count. ``advance`` is told of every batch.

        The texts that make a chunk, and so every bit of their vectors, depend on their order only.
        """
        hook = self._model.model.register_forward_hook(lambda *call: advance(_rows(call[2])))
        try:
            for chunk in batched((text[: self.head_chars] for text in texts), CHUNK_DOCUMENTS):
                yield self._encode(list(chunk))
        finally:
            hook.remove()

    def _encode(self, texts: list[str]) -> npt.NDArray[np.float32]:
        """Embed one chunk; FlagEmbedding sorts it by token count, so that batches hold little padding."""
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars cannot be switched off
            encoded = self._model.encode(texts, batch_size=self._batch_size, max_length=self._max_tokens)
        dense = encoded["dense_vecs"] if isinstance(encoded, dict) else encoded
        vectors = np.asarray(dense, dtype=np.float32)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not np.isfinite(norms).all() or not norms.all():
            raise L0MoEError(
                f"Encoder {self._model.model_name_or_path} gave zero or non-finite vectors; check its weights."
            )
        return np.asarray(vectors / norms, dtype=np.float32)


def load_encoder(name: str, *, max_tokens: int, batch_size: int) -> Encoder:
    """Load an encoder in fp32 on this process' device.

    Raises:
        L0MoEError: the model is not on this machine, is damaged, takes fewer than ``max_tokens`` tokens, or pools
            in a way that FlagEmbedding does not know.
    """
    folder = find_model(name)
    limit = _max_positions(folder)
    if max_tokens > limit:
        raise L0MoEError(
            f"data.embedding_max_tokens ({max_tokens}) is more than the {limit} tokens that encoder {name} takes; "
            f"set it to {limit} or less."
        )
    options: dict[str, Any] = {"use_fp16": False, "devices": str(device())}
    if is_bge_m3(folder):
        from FlagEmbedding import BGEM3FlagModel as Model  # seconds to import: only when it is used
    else:
        from FlagEmbedding import FlagModel as Model

        options["pooling_method"] = pooling_method(folder)
    from safetensors import SafetensorError

    try:
        model = Model(str(folder), **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()
        raise L0MoEError(
            f"Encoder {name} in {folder} cannot be loaded ({reason[0] if reason else type(error).__name__}); "
            "download the model again."
        ) from error
    logger.info("encoder %s: %s, %d tokens, %s", name, Model.__name__, max_tokens, options["devices"])
    return Encoder(model, max_tokens=max_tokens, batch_size=batch_size)


def find_model(name: str) -> Path:
    """Return the local folder of a model given by path or Hub name.

    Raises:
        L0MoEError: it is not on this machine; the message says how to get it.
    """
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise L0MoEError(
                f"Encoder {name} is neither a folder nor in the local Hugging Face cache; download it first, for "
                "example with `hf download BAAI/bge-m3 --local-dir models/bge-m3`, and set data.embedding_model "
                "to that folder."
            ) from error
    missing = [file for file in ("config.json", "tokenizer_config.json") if not (folder / file).is_file()]
    if not any((folder / file).is_file() for file in ("model.safetensors", "pytorch_model.bin")):
        missing.append("model.safetensors")
    if missing:
        raise L0MoEError(
            f"Encoder folder {folder} lacks {', '.join(missing)}; set data.embedding_model to a complete model."
        )
    return folder


def is_bge_m3(folder: Path) -> bool:
    """Tell BGE-M3 by the weights of its extra heads, which no other encoder ships."""
    return all((folder / file).is_file() for file in ("colbert_linear.pt", "sparse_linear.pt"))


def pooling_method(folder: Path) -> str:
    """Return FlagEmbedding's name of the pooling that the checkpoint was trained with: "mean" or "cls"."""
    file = folder / "1_Pooling" / "config.json"
    if not file.is_file():
        raise L0MoEError(
            f"Encoder folder {folder} lacks 1_Pooling/config.json, which tells mean from cls pooling."
        )
    config = json.loads(file.read_text(encoding="utf-8"))
    prefix = "pooling_mode_"
    modes = [key.removeprefix(prefix) for key, on in config.items() if key.startswith(prefix) and on is True]
    if modes == ["mean_tokens"]:
        return "mean"
    if modes == ["cls_token"]:
        return "cls"
    raise L0MoEError(
        f"{file} asks for pooling {' + '.join(modes) or 'none'}; FlagEmbedding pools by mean_tokens or cls_token, "
        "so choose another encoder."
    )


def _max_positions(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    positions = int(config.get("max_position_embeddings", 512))
    if "roberta" in str(config.get("model_type")):  # RoBERTa's positions start after the padding id
        positions -= int(config.get("pad_token_id", 1)) + 1
    return positions


def _rows(output: Any) -> int:
    """Return the number of texts in one forward pass' output."""
    hidden = output["dense_vecs"] if "dense_vecs" in output else output["last_hidden_state"]
    return len(hidden)

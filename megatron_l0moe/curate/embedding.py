"""Semantic vectors of documents through FlagEmbedding: BGE-M3 (the paper's encoder) or any BERT-like encoder.

Nothing here uses the network: a model is a folder, or a Hub name that already lies in the local Hugging Face cache. The
vectors lie in several .npy files, whose rows are read in pieces as if they were one array [N, V].

Shape letters: N = documents, V = embedding dimension.
"""

import contextlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.runtime.cpu import device

logger = logging.getLogger(__name__)

Ids = npt.NDArray[np.int64]
FLOATS = (np.dtype(np.float16), np.dtype(np.float32))


class VectorShards:
    """Rows of .npy files [n_i, V], float16 or float32, one file after the other.

    A file is mapped only while rows are copied out of it: the pages of a map that stays open count as the memory of
    this process, and a scheduler may end it for that.
    """

    def __init__(self, files: Sequence[Path], rows: Ids | None = None) -> None:
        """Look at the files' headers.

        Args:
            files: at least one, in order.
            rows: int64 [N], the rows of all files together that this array has, in its order; None: all.

        Raises:
            L0MoEError: a file is missing, cut short, of another type, or its vectors are of another length.
        """
        self._files = [Path(file) for file in files]
        maps = [_open(file) for file in self._files]
        dimension, self._dtype = maps[0].shape[1], maps[0].dtype
        for file, array in zip(self._files, maps, strict=True):
            if (array.shape[1], array.dtype) != (dimension, self._dtype):
                raise L0MoEError(
                    f"Embeddings {file} are {array.dtype} [n, {array.shape[1]}], but {self._files[0]} is {self._dtype} "
                    f"[n, {dimension}]; remove the embeddings and start curate again."
                )
        self._ends = np.cumsum([len(array) for array in maps], dtype=np.int64)
        self._rows = rows
        self.shape = (int(self._ends[-1]) if rows is None else len(rows), int(dimension))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Ids) -> npt.NDArray[np.floating[Any]]:
        """Return a copy of some rows, in the order asked for; each file is read from its start to its end."""
        wanted = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows)
        if self._rows is not None:
            wanted = self._rows[wanted]
        found = np.empty((len(wanted), self.shape[1]), dtype=self._dtype)
        order = np.argsort(wanted, kind="stable")
        file_of = np.searchsorted(self._ends, wanted[order], side="right")
        for number in np.unique(file_of):
            here = order[file_of == number]
            first = int(self._ends[number - 1]) if number else 0
            found[here] = _open(self._files[number])[wanted[here] - first]
        return found


def _open(file: Path) -> npt.NDArray[np.floating[Any]]:
    """Map a file of vectors."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise L0MoEError(
            f"Embeddings {file} cannot be read ({' '.join(str(error).split())}); remove them and start curate again."
        ) from error
    if array.ndim != 2 or array.dtype not in FLOATS:
        raise L0MoEError(
            f"Embeddings {file} are {array.dtype} {list(array.shape)}, not float16 or float32 [n, dimension]; remove "
            "them and start curate again."
        )
    return np.asarray(array)


HEAD_CHARS_PER_TOKEN = 16
"""Characters of a text that are given to the tokenizer, per token that is embedded: about four times what
ordinary text needs, so that a text of 200 MB costs no more than a page."""
CHUNK_DOCUMENTS = 2048
"""Documents that are sorted by length and embedded together; bounds the memory for texts."""
MODULES = ("Transformer", "Pooling", "Normalize")
"""Modules of sentence-transformers whose work is done here; a vector's length does not count, so the last is free."""
POOLINGS = {"mean": "mean", "cls": "cls", "mean_sqrt_len_tokens": "mean"}
"""FlagEmbedding's names of sentence-transformers' poolings; the last differs from the mean in length only."""
LEGACY_POOLINGS = {"mean_tokens": "mean", "cls_token": "cls"}
"""Names in the form of one switch for each pooling, where they are others."""


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
    """Load an encoder in fp32 on this process' device."""
    folder = check_encoder(name, max_tokens=max_tokens)
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


def check_encoder(name: str, *, max_tokens: int) -> Path:
    """Return the folder of an encoder that FlagEmbedding computes as the folder asks for, without loading it.

    Raises:
        L0MoEError: the model is not on this machine, is incomplete, takes fewer than ``max_tokens`` tokens, or asks for
            what FlagEmbedding does not do.
    """
    folder = find_model(name)
    asked = _asked_for(folder)
    if asked:
        raise L0MoEError(
            f"Encoder {folder} asks for {asked}, which FlagEmbedding does not do; choose another encoder."
        )
    if not is_bge_m3(folder):
        pooling_method(folder)
    limit = _max_tokens(folder)
    if max_tokens > limit:
        raise L0MoEError(
            f"data.embedding_max_tokens ({max_tokens}) is more than the {limit} tokens that encoder {name} takes; "
            f"set it to {limit} or less."
        )
    return folder


def _asked_for(folder: Path) -> str | None:
    """Return what a folder asks for beyond a transformer, pooling and normalising, None if nothing."""
    modules = _json(folder / "modules.json", [])
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules if isinstance(module, dict)]
    settings, bert = _json(folder / "config_sentence_transformers.json", {}), _bert_config(folder)
    prompt = settings.get("default_prompt_name")
    lowered = bert.get("do_lower_case") and not _json(folder / "tokenizer_config.json", {}).get(
        "do_lower_case"
    )
    task, kind = bert.get("transformer_task"), settings.get("model_type")
    asked = {
        f"the module {next((name for name in kinds if name not in MODULES), '')} in modules.json": (
            any(name not in MODULES for name in kinds)
        ),
        f"the prompt {prompt!r} before each text": prompt and (settings.get("prompts") or {}).get(prompt),
        f"a model of type {kind}": kind not in (None, "SentenceTransformer"),
        f"the task {task}": task not in (None, "feature-extraction"),
        "lower-cased text (do_lower_case)": lowered,
        "an adapter (adapter_config.json)": (folder / "adapter_config.json").is_file(),
        "an encoder with a decoder": _json(folder / "config.json", {}).get("is_encoder_decoder"),
    }
    return next((what for what, is_asked in asked.items() if is_asked), None)


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
    modules = _json(folder / "modules.json", [])
    places = [m["path"] for m in modules if isinstance(m, dict) and str(m.get("type")).endswith(".Pooling")]
    file = folder / (str(places[0]) if places else "1_Pooling") / "config.json"
    if not file.is_file():
        raise L0MoEError(
            f"Encoder folder {folder} lacks {file.relative_to(folder)}, which tells mean from cls pooling."
        )
    modes = _pooling_modes(_json(file, {}))
    if len(modes) == 1 and modes[0] in POOLINGS:
        return POOLINGS[modes[0]]
    raise L0MoEError(
        f"{file} asks for pooling {' + '.join(modes)}; FlagEmbedding pools by mean or cls, so choose another encoder."
    )


def _pooling_modes(config: dict[str, Any]) -> list[str]:
    """Return the poolings that a file asks for, in its newer form (`pooling_mode`) or as one switch for each."""
    new = config.get("pooling_mode")
    if new is not None:
        return [str(mode) for mode in new] if isinstance(new, list) else [str(new)]
    prefix = "pooling_mode_"
    switches = {key.removeprefix(prefix): on for key, on in config.items() if key.startswith(prefix)}
    modes = [LEGACY_POOLINGS.get(mode, mode) for mode, on in switches.items() if on]
    return modes or (["mean"] if switches else ["none"])  # all off: sentence-transformers takes the mean


def _max_tokens(folder: Path) -> int:
    """Return the tokens that an encoder takes: its positions, or fewer where sentence-transformers is to cut there."""
    config = _json(folder / "config.json", {})
    positions = int(config.get("max_position_embeddings") or 512)
    if "roberta" in str(config.get("model_type")):  # RoBERTa's positions start after the padding id
        positions -= int(config.get("pad_token_id") or 1) + 1
    cut = _bert_config(folder).get("max_seq_length")
    return min(positions, cut) if isinstance(cut, int) else positions


def _bert_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = _json(folder / "sentence_bert_config.json", {})
    return config


def _json(file: Path, default: Any) -> Any:
    """Return what a file holds, the default if there is no such file.

    Raises:
        L0MoEError: it is damaged, or holds another kind of value.
    """
    if not file.is_file():
        return default
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise L0MoEError(f"{file} is damaged ({error}); download the model again.") from error
    if not isinstance(value, type(default)):
        raise L0MoEError(f"{file} holds no {type(default).__name__}; download the model again.")
    return value


def _rows(output: Any) -> int:
    """Return the number of texts in one forward pass' output."""
    hidden = output["dense_vecs"] if "dense_vecs" in output else output["last_hidden_state"]
    return len(hidden)

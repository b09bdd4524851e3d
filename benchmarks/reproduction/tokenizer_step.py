"""Step `tokenizer`: a byte-level BPE of the training text, and the config of the model that will use it."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scanned import scan_corpus
from settings import DataSettings, ModelSettings, TokenizerSettings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_l0moe.curate.corpus.catalog import read_documents
from megatron_l0moe.runs.stage_folder import write_json
from megatron_l0moe.sizes.architecture import Architecture

EOD = "<|endoftext|>"


def make_model_folder(
    train: Path, out: Path, tokenizer: TokenizerSettings, model: ModelSettings, data: DataSettings
) -> dict[str, object]:
    """Write a Hugging Face folder without weights: config.json, tokenizer.json, tokenizer_config.json."""
    bpe = train_bpe(train, tokenizer)
    # one end-of-document token; nothing else is special, since every model here sees plain text
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOD, bos_token=EOD).save_pretrained(out)
    eod = bpe.token_to_id(EOD)
    write_json(out / "config.json", llama_config(model, bpe.get_vocab_size(), data.seq_length, eod))
    return {"vocab_size": bpe.get_vocab_size(), "eod": eod}


def train_bpe(train: Path, settings: TokenizerSettings) -> Tokenizer:
    """Return the tokenizer; every domain gives the same amount of text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_sample(train, settings.chars_per_domain), trainer)
    return bpe


def _sample(train: Path, chars: int) -> Iterator[str]:
    catalog = scan_corpus(train)
    keys = catalog.random_keys(0)
    for number in range(len(catalog.domains)):
        ids = np.flatnonzero(catalog.rows["domain"] == number)
        ids = ids[np.argsort(keys[ids], kind="stable")]
        ends = np.cumsum(catalog.column("chars")[ids])
        chosen = np.sort(ids[: int(np.searchsorted(ends, chars)) + 1])
        yield from (document.text for _, document in read_documents(catalog, chosen))


def llama_config(model: ModelSettings, vocab_size: int, seq_length: int, eod: int) -> dict[str, object]:
    """Return config.json of the dense model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.hidden // model.heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": seq_length,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": eod,
        "eos_token_id": eod,
        "torch_dtype": "float32",
    }


def parameters(folder: Path) -> int:
    """Return the number of parameters of a folder's config, embeddings counted once."""
    a = Architecture.from_config(json.loads((folder / "config.json").read_text()), folder / "config.json")
    attention = a.hidden_size * a.head_dim * (2 * a.num_attention_heads + 2 * a.num_query_groups)
    layer = attention + 3 * a.hidden_size * a.ffn_hidden_size + 2 * a.hidden_size
    return a.vocab_size * a.hidden_size + a.num_layers * layer + a.hidden_size

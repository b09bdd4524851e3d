"""A whole run in small, made on the spot: a random Llama, a random encoder, a corpus of three topics, a recipe."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, PreTrainedTokenizerFast

TOPICS = {
    "cooking": "flour butter oven sugar bake dough knead salt pepper onion garlic soup simmer roast whisk pan",
    "sailing": "mast keel anchor harbour tide rudder hull knot deck sail wind buoy chart compass reef bow",
    "physics": "quark energy photon mass momentum field charge spin atom wave particle boson gauge proton ion",
}
DOCUMENTS, WORDS = 40, 120
LAYERS, DENSE, HIDDEN, FFN, EXPERT_FFN, VOCAB = 3, 1, 32, 48, 16, 384


def make_world(folder: Path) -> Path:
    """Write model, encoder, corpus and recipe; returns the recipe's file, whose paths are absolute."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    for topic, words in TOPICS.items():
        _write_topic(corpus / f"{topic}.jsonl", topic, words.split())
    _write_model(folder / "model")
    _write_encoder(folder / "encoder")
    recipe: dict[str, Any] = {
        "name": "toy",
        "dtype": "bfloat16",
        "model": {
            "path": str(folder / "model"),
            "dense_layers": DENSE,
            "num_experts": 2,
            "expert_ffn": EXPERT_FFN,
            "top_k": 2,
        },
        "data": {
            "corpus": str(corpus),
            "embedding_model": str(folder / "encoder"),
            "embedding_max_tokens": 32,
            "iterations": 3,
            "seq_length": 32,
            "tokens_per_expert": 640,
            "tokens_per_set": 256,
            "heldout_tokens_per_domain": 256,
        },
        "expert_training": {
            "micro_batch_size": 2,
            "global_batch_size": 2,
            "learning_rate": 1e-3,
            "save_interval": 4,
            "flags": {"l0-freeze-fraction": 0.3},
        },
        "moe_training": {
            "micro_batch_size": 2,
            "learning_rate": 1e-3,
            "router_learning_rate": 1e-2,
            "save_interval": 3,
        },
        "evaluation": {
            "dtype": "float32",
            "prefill_tokens": 16,
            "decode_tokens": 4,
            "repeats": 2,
            "parity_positions": 24,
        },
    }
    file = folder / "toy.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return file


def change_recipe(recipe: Path, file: Path, section: str, **changes: Any) -> Path:
    """Write the recipe with some keys of a section changed to `file`, which is returned."""
    raw = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    raw[section] |= changes
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return file


def command(recipe: Path, runs: Path, *words: str) -> list[str]:
    """Return the command line of a whole run."""
    return [sys.executable, "-m", "megatron_l0moe", "run", str(recipe), "--runs-dir", str(runs), *words]


def environment() -> dict[str, str]:
    """One thread a process: the sums of a test must not depend on the machine's load."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(recipe: Path, runs: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the chain to its end."""
    return subprocess.run(
        command(recipe, runs, *words),
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
        timeout=900,
    )


def _write_topic(file: Path, topic: str, words: list[str]) -> None:
    with file.open("w", encoding="utf-8") as lines:
        for seed in range(DOCUMENTS):
            picked = (words[(seed * 7 + i * (3 + seed % 5) + i * i) % len(words)] for i in range(WORDS))
            text = f"{topic} {seed} " + " ".join(picked)
            lines.write(json.dumps({"text": text, "meta": {"source": topic}}) + "\n")


def _write_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 8,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(TOPICS.values()) * 20, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


def _write_encoder(folder: Path) -> None:
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words = special + sorted({word for topic in TOPICS.values() for word in topic.split()})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=66,
        pad_token_id=1,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    pooling = {
        "word_embedding_dimension": 32,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_cls_token": False,
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")

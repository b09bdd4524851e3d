"""A language model whose every answer can be foretold: the next token depends on the last token alone.

A Llama whose attention and FFN add nothing: the hidden state of a position is its token's one-hot embedding, and
the LM head holds the table of successors.
"""

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

UNKNOWN, END = "<unk>", "<end>"
WORDS = (
    UNKNOWN,
    END,
    " ",
    "\n",
    ":",
    "Answer:",
    "A:",
    "A",
    "B",
    "C",
    "D",
    "7",
    "8",
    "True",
    "False",
    "    return ",
)
PATTERN = r"    return |Answer:|A:|[A-Za-z]+|[0-9]+|\s|[^\w\s]"
SURE, LIKELY = 12.0, 6.0
"""Logits before the norm's scale; every other successor has 0."""


def write_model(folder: Path, successors: dict[str, str], *, second: dict[str, str]) -> Path:
    """Write a checkpoint whose greedy answer follows `successors`; `second` holds the next best ones."""
    ids = {word: index for index, word in enumerate(WORDS)}
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=len(WORDS),
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1536,
        tie_word_embeddings=False,
        bos_token_id=ids[UNKNOWN],
        eos_token_id=ids[END],
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(WORDS)))
        model.model.norm.weight.fill_(1.0)
        for table, logit in ((second, LIKELY), (successors, SURE)):
            for word, following in table.items():
                model.lm_head.weight[ids[following], ids[word]] = logit
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNKNOWN,
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder

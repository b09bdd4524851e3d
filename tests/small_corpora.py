"""Small models and corpora, made on the spot: nothing is downloaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

_TOPICS = {
    "cooking": "flour butter oven sugar bake dough knead salt pepper onion garlic soup simmer roast whisk pan",
    "sailing": "mast keel anchor harbour tide rudder hull knot deck sail wind buoy chart compass reef bow",
    "physics": "quark energy photon mass momentum field charge spin atom wave particle boson gauge proton ion",
}
WORDS = {topic: words.split() for topic, words in _TOPICS.items()}


@pytest.fixture
def write_lines() -> Callable[[Path, list[Any]], Path]:
    """Write records (or raw strings) as lines of a .jsonl or .jsonl.zst shard."""

    def write(path: Path, records: list[Any]) -> Path:
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        raw = "".join(line + "\n" for line in lines).encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(zstandard.ZstdCompressor().compress(raw) if path.suffix == ".zst" else raw)
        return path

    return write


@pytest.fixture(scope="session")
def topic_text() -> Callable[[str, int, int], str]:
    """Return deterministic text of one topic: topic_text(domain, seed, words)."""

    def text(domain: str, seed: int, words: int) -> str:
        vocabulary = WORDS[domain]
        return f"{domain} {seed} " + " ".join(
            vocabulary[(seed * 7 + i * (3 + seed % 5) + i * i) % len(vocabulary)] for i in range(words)
        )

    return text


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a real byte-level BPE tokenizer.json and config.json (no weights)."""
    folder = tmp_path_factory.mktemp("tiny_lm")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words) for words in WORDS.values()] * 20, trainer)
    tokenizer.enable_truncation(4)  # a trap that real tokenizer files hold: it must be switched off
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 512, "eos_token_id": 1}))
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real BERT encoder with random weights, in the layout of a sentence-transformers checkpoint."""
    return _encoder(tmp_path_factory.mktemp("tiny_encoder"), bge_m3=False)


@pytest.fixture(scope="session")
def tiny_bge_m3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real XLM-RoBERTa encoder with random weights and BGE-M3's two extra heads."""
    return _encoder(tmp_path_factory.mktemp("tiny_bge_m3"), bge_m3=True)


def _encoder(folder: Path, *, bge_m3: bool) -> Path:
    import torch
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words = special + sorted({word for topic in WORDS.values() for word in topic})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 66, "pad_token_id": 1,
        "initializer_range": 0.5,
    }  # fmt: skip
    model = XLMRobertaModel(XLMRobertaConfig(**size)) if bge_m3 else BertModel(BertConfig(**size))
    model.save_pretrained(folder)
    if bge_m3:
        torch.save(torch.nn.Linear(32, 32).state_dict(), folder / "colbert_linear.pt")
        torch.save(torch.nn.Linear(32, 1).state_dict(), folder / "sparse_linear.pt")
    pooling = {"pooling_mode_cls_token": bge_m3, "pooling_mode_mean_tokens": not bge_m3}
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    return folder


@pytest.fixture
def toy_index(tmp_path: Path) -> Callable[..., Any]:
    """Write a small index over shards of numbered tokens, and return what a reader must find.

    Token = 1000 * iteration + 100 * cluster + running number mod 100, so that a wrong one is seen at once.
    """
    import numpy as np
    import torch
    from curated import describe_shard
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from megatron_l0moe.index.index import DOC, ClusterBlock, IterationBlock, write_index

    def build(
        *, clusters: int = 4, order: tuple[int, ...] = (2, 1), rounds: int | dict[int, int] = 6, p: int = 2,
        seq_length: int = 8, rotate: bool = True, kind: str = "moe", name: str = "moe",
        shuffle_seed: int | None = None,
    ) -> tuple[Path, dict[tuple[int, int], list[int]]]:  # fmt: skip
        rng = np.random.default_rng(7)
        streams: dict[tuple[int, int], list[int]] = {}
        blocks = []
        for iteration in order:
            rounds_here = rounds[iteration] if isinstance(rounds, dict) else rounds
            prefixes = [tmp_path / f"iter_{iteration:03d}" / f"shard_{n:05d}" for n in range(2)]
            prefixes[0].parent.mkdir(exist_ok=True)
            builders = [IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16) for prefix in prefixes]
            written = [0, 0]
            per_cluster = []
            for cluster in range(clusters):
                lengths, places, stream = [], [], []
                while len(stream) < rounds_here * seq_length + 1:
                    length = int(rng.integers(1, 3 * seq_length))
                    start = len(stream)
                    tokens = [1000 * iteration + 100 * cluster + (start + i) % 100 for i in range(length)]
                    shard = int(rng.integers(2))
                    builders[shard].add_document(torch.tensor(tokens), [length])
                    places.append((shard, written[shard]))
                    written[shard] += 1
                    lengths.append(length)
                    stream += tokens
                streams[iteration, cluster] = stream
                per_cluster.append(ClusterBlock(cluster, np.array(places, dtype=DOC), np.array(lengths)))
            for builder, prefix in zip(builders, prefixes, strict=True):
                builder.finalize(f"{prefix}.idx")
            shards = [describe_shard(prefix, tmp_path) for prefix in prefixes]
            blocks.append(IterationBlock(iteration, shards, per_cluster, rounds_here))
        write_index(
            tmp_path / name, blocks, kind=kind, num_domains=clusters, iterations=3, seq_length=seq_length,
            d_ds=[0.2, 0.1], sequences_per_domain=p, rotate=rotate, tokenizer_sha256="t", vocab_size=5000, eod=0,
            shuffle_seed=shuffle_seed,
        )  # fmt: skip
        return tmp_path / name, streams

    return build

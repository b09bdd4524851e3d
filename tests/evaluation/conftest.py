"""Tiny random models and held-out text."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))

VOCAB, LENGTH = 64, 17
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a dense model and of an L0-MoE of the exported layout: 1 dense layer, 2 with 4 experts, top 2."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(root / "dense")
    config = Ernie4_5_MoeConfig(
        **SIZES,
        moe_intermediate_size=8,
        moe_k=2,
        moe_num_experts=4,
        moe_num_shared_experts=0,
        moe_layer_start_index=1,
        tie_word_embeddings=False,
    )
    moe = Ernie4_5_MoeForCausalLM(config)
    for layer in moe.model.layers[1:]:
        torch.nn.init.normal_(layer.mlp.gate.weight)
    moe.save_pretrained(root / "moe")
    return root / "dense", root / "moe"


@pytest.fixture(scope="session")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten sequences of two domains and three clusters; one is shorter than the others."""
    generator = torch.Generator().manual_seed(1)
    file = tmp_path_factory.mktemp("heldout") / "heldout.jsonl"
    with file.open("w") as lines:
        for i in range(10):
            tokens = torch.randint(VOCAB, (LENGTH if i != 4 else 9,), generator=generator).tolist()
            lines.write(
                json.dumps({"tokens": tokens, "domain": "novel" if i % 3 else "code", "cluster": i % 3})
                + "\n"
            )
    return file

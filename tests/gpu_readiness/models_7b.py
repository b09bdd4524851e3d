"""config.json of the three base models of examples/, as published (only the keys that are read)."""

from pathlib import Path
from typing import Any

from megatron_l0moe.conversion.architecture import Architecture

LLAMA_3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
MISTRAL_7B: dict[str, Any] = {
    **LLAMA_3_8B,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 32768,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
QWEN2_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
CONFIGS = {"llama3_8b": LLAMA_3_8B, "mistral_7b": MISTRAL_7B, "qwen2_7b": QWEN2_7B}


def architecture(recipe: str) -> Architecture:
    """Return the base model of a recipe of examples/."""
    return Architecture.from_config(CONFIGS[recipe], Path("config.json"))

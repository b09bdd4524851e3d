"""Sizes of the paper's base models, as in their published config.json: plans need no download."""

from typing import Any

_COMMON: dict[str, Any] = {"tie_word_embeddings": False, "torch_dtype": "bfloat16"}
LLAMA_3_8B: dict[str, Any] = _COMMON | {
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
}
MISTRAL_7B_V03: dict[str, Any] = LLAMA_3_8B | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 32768,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
MISTRAL_7B_V01: dict[str, Any] = MISTRAL_7B_V03 | {
    "vocab_size": 32000,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
}
QWEN2_7B: dict[str, Any] = _COMMON | {
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
    "use_sliding_window": False,
}
PUBLISHED = {
    "meta-llama-3-8b": LLAMA_3_8B,
    "llama-3-8b": LLAMA_3_8B,
    "mistral-7b-v0.1": MISTRAL_7B_V01,
    "mistral-7b-v0.3": MISTRAL_7B_V03,
    "qwen2-7b": QWEN2_7B,
}
"""By the name of the folder in small letters."""

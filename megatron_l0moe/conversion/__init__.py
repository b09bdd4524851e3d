"""Checkpoints from one layout to another: Hugging Face, GGUF, Megatron."""

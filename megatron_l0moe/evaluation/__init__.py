"""Perplexity, router load and speed of Hugging Face checkpoints, dense against L0-MoE."""

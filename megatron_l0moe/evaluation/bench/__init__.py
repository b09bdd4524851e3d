"""`l0moe bench`: a dense model and its L0-MoE timed side by side, in transformers and in vLLM."""

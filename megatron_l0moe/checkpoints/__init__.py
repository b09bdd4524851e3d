"""Weight files of Hugging Face and Megatron, a block of rows at a time, and the rules between the two."""

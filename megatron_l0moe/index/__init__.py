"""Tokens and their order on disk: token files, sample indexes, the datasets that training reads."""

"""Quantization recipes; Megatron derives a class from one of them, none is used."""


class DelayedScaling:
    """Base of Megatron's TEDelayedScaling."""

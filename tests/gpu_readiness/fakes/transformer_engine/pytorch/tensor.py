"""Quantized tensors; there are none."""


class QuantizedTensor:
    """Base class that Megatron asks `isinstance` for."""

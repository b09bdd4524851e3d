"""Transformer Engine without its kernels: what megatron-core 0.19.2 imports from it, computed by plain torch.

The signatures are those of Transformer Engine 2.17.1, the version that Megatron-LM's core_v0.19.0 pins (pyproject.toml,
commit 4329ff84), so that an argument that does not exist there fails here too. One rank only: no tensor parallelism.
Nothing here says how fast or how exact the real kernels are.
"""

from transformer_engine import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "2.17.1"

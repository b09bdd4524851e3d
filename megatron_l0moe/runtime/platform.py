"""What depends on the platform: Megatron's flags for device and optional libraries, and how malloc keeps freed memory.

A flag that the user gives wins; these only fill in what is not said.
"""

import ctypes
import importlib
import importlib.util
from collections.abc import Iterable

import torch

from megatron_l0moe.runtime.cpu import has_cuda

# malloc.h of glibc. The first is the highest that it accepts.
_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES = -3, 32 * 2**20
_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES = -1, 128 * 2**20


def keep_freed_memory() -> None:
    """Let this process use the pages of freed blocks of some MB again, where the C library is glibc.

    By default it gives them back to the system. A conversion, which reads one block after the other, then waits for
    the system to clear the pages of each block, which takes longer than to read it: 1.7 GB/s instead of 4.6 measured.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        mallopt(_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)


# Kernels that exist on CUDA only, or whose unfused form is as fast on a CPU.
CPU_FLAGS = (
    ("--distributed-backend", "gloo"),
    ("--transformer-impl", "local"),
    ("--use-cpu-initialization", None),
    ("--no-gradient-accumulation-fusion", None),
    ("--no-persist-layer-norm", None),
    ("--no-masked-softmax-fusion", None),
    ("--no-bias-swiglu-fusion", None),
    ("--no-rope-fusion", None),
)


def has_transformer_engine() -> bool:
    """Return whether Megatron will find Transformer Engine; asks as core/extensions/transformer_engine.py:71 does.

    To look for the package is not enough: without its part for PyTorch Megatron takes it for absent.
    """
    try:
        importlib.import_module("transformer_engine.pytorch.fp8")
    except ImportError:
        return False
    return True


def has_apex_wgrad_fusion() -> bool:
    """Return whether NVIDIA Apex's fused weight-gradient kernel can be imported."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def platform_flags(given: Iterable[str], *, moe: bool = False) -> list[str]:
    """Return the flags to add to the ``given`` command line so that Megatron runs on this machine."""
    names = {argument.split("=", 1)[0] for argument in given}
    flags: list[tuple[str, str | None]] = []
    if not has_cuda():
        flags += CPU_FLAGS
        if moe:
            # gloo's all-to-all needs split sizes on the host; all-gather needs none
            flags.append(("--moe-token-dispatcher-type", "allgather"))
    else:
        flags += _cuda_flags(moe)
    added: list[str] = []
    for name, value in flags:
        if name not in names:
            added += [name] if value is None else [name, value]
    return added


def _cuda_flags(moe: bool) -> list[tuple[str, str | None]]:
    flags: list[tuple[str, str | None]] = []
    has_te = has_transformer_engine()
    if has_te:
        flags.append(("--transformer-impl", "transformer_engine"))
    else:
        # Megatron's fused RoPE is Transformer Engine's, and on by default (transformer_config.py:2186 refuses it)
        flags += [("--transformer-impl", "local"), ("--no-rope-fusion", None)]
    if not has_apex_wgrad_fusion():
        flags.append(("--no-gradient-accumulation-fusion", None))
    if moe:
        flags.append(("--moe-token-dispatcher-type", "alltoall"))
        if has_te:
            flags += [("--moe-grouped-gemm", None), ("--moe-permute-fusion", None)]
    return flags


def expert_row_multiple(dtype: torch.dtype) -> int:
    """Return the multiple to which the rows of an expert's matrices are filled up.

    For bfloat16 oneDNN compiles a kernel for each new shape, which takes longer than the product itself; in steps of
    32 rows an MoE step has a dozen shapes instead of hundreds of new ones. float32 products compile nothing.
    """
    return 1 if has_cuda() or dtype is torch.float32 else 32

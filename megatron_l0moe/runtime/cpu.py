"""Run Megatron-Core's CUDA code on the CPU with gloo.

`install` is a no-op when CUDA exists. Otherwise it replaces, by name, the few symbols that keep
megatron-core 0.19.2 from running without a device, and asserts that each of them still exists, so that
another Megatron version fails here with the symbol's name and not somewhere inside a training step.
Nothing outside `runtime/` knows on which of the two it runs.

Call `install` before any module of `megatron` is imported, `install_training` before `megatron.training.pretrain`.
"""

import contextlib
import functools
import importlib
import logging
import time
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
REPORTED_DEVICES = 8  # any number > 0: Megatron builds its process groups only when devices are counted

_installed: list[TorchFunctionMode] = []


def has_cuda() -> bool:
    """Return whether a CUDA device can be used."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Return the device that this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else CPU


class _CudaToCpu(TorchFunctionMode):
    """Read every CUDA device in a torch call as the CPU.

    Needed by literals such as ``device="cuda"`` (core/optimizer/optimizer.py:698, clip_grads.py:96,
    pipeline_parallel/schedules.py:749) and by type names (core/optimizer/optimizer.py:1009,
    clip_grads.py:174), where Megatron asks for 'torch.cuda.FloatTensor'.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": CPU}
        if func is torch.Tensor.to:
            args = tuple(CPU if _is_cuda(argument) else argument for argument in args)
        if func is torch.Tensor.type:
            return _tensor_type(func, args, kwargs)
        return func(*args, **kwargs)


def _is_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    if isinstance(value, str):
        return value.startswith("cuda")
    return type(value) is int


def _tensor_type(func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) > 1 and isinstance(args[1], str):
        args = (args[0], args[1].replace("torch.cuda.", "torch."), *args[2:])
    result = func(*args, **kwargs)
    if isinstance(result, str) and not result.startswith("torch.cuda"):
        return result.replace("torch.", "torch.cuda.", 1)
    return result


class _Event:
    """Stand-in for torch.cuda.Event: the CPU runs in program order, so every wait is over at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time = time.perf_counter()

    def record(self, *args: Any) -> None:
        self._time = time.perf_counter()

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "_Event") -> float:
        return (other._time - self._time) * 1e3


class _Stream:
    """Stand-in for torch.cuda.Stream; all of them are the one program order."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


def _constant(value: Any) -> Callable[..., Any]:
    # Every patched name needs its own function object: torch._dynamo refuses one object under two names.
    return lambda *args, **kwargs: value


def _cuda_surface() -> dict[str, Any]:
    """Replacements for `torch.cuda.NAME`."""
    stream = _Stream()
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=1, name="cpu", total_memory=0)
    surface: dict[str, Any] = {
        "current_device": lambda: CPU,
        "device_count": lambda: REPORTED_DEVICES,
        "get_device_properties": _constant(properties),
        "get_device_capability": _constant((9, 0)),
        "is_current_stream_capturing": lambda: False,
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *args, **kwargs: stream,
        "default_stream": lambda *args, **kwargs: stream,
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
        "get_rng_state": lambda *args, **kwargs: torch.default_generator.get_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.default_generator.set_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)) and None,
        # must not call torch.manual_seed, which calls this: it would never return
        "manual_seed_all": lambda seed: None,
        "memory_stats": lambda *args, **kwargs: {},
    }
    for name in ("set_device", "synchronize", "empty_cache", "set_stream", "reset_peak_memory_stats"):
        surface[name] = _constant(None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        surface[name] = _constant(0)
    for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor", "IntTensor", "LongTensor"):
        surface[name] = getattr(torch, name)
    return surface


def _all_to_all_single(original: Callable[..., Any]) -> Callable[..., Any]:
    """Take split sizes as tensors too (core/tensor_parallel/mappings.py:449 passes them so on the CPU)."""

    @functools.wraps(original)
    def all_to_all_single(
        output: Any,
        input: Any,  # noqa: A002  # torch's own name, given by keyword
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        sizes = [
            None if split is None else [int(n) for n in split]
            for split in (output_split_sizes, input_split_sizes)
        ]
        return original(output, input, *sizes, group=group, async_op=async_op)

    return all_to_all_single


def _all_gather(original: Callable[..., Any]) -> Callable[..., Any]:
    """Gather parts of different lengths, which gloo refuses, by filling them up to the longest.

    The all-to-all dispatcher with expert-tensor parallelism needs it (core/tensor_parallel/mappings.py:154).
    """

    @functools.wraps(original)
    def all_gather(tensor_list: Any, tensor: Any, group: Any = None, async_op: bool = False) -> Any:
        if len({part.shape for part in tensor_list}) == 1:
            return original(tensor_list, tensor, group=group, async_op=async_op)
        assert not async_op, "Megatron waits for uneven parts"
        longest = max(part.shape[0] for part in tensor_list)
        filled = tensor.new_zeros((longest, *tensor.shape[1:]))
        filled[: tensor.shape[0]] = tensor
        gathered = [torch.empty_like(filled) for _ in tensor_list]
        original(gathered, filled, group=group)
        for part, whole in zip(tensor_list, gathered, strict=True):
            part.copy_(whole[: part.shape[0]])
        return None

    return all_gather


def _init_process_group(original: Callable[..., Any]) -> Callable[..., Any]:
    """Drop `device_id`, which training/initialize.py passes as a CUDA device and gloo refuses."""

    @functools.wraps(original)
    def init_process_group(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        return original(*args, **kwargs)

    return init_process_group


def _replace(owner: Any, name: str, value: Any) -> None:
    where = getattr(owner, "__name__", repr(owner))
    assert hasattr(owner, name), f"{where}.{name} is gone; runtime/cpu.py patches it for megatron-core 0.19.2"
    setattr(owner, name, value)


def install() -> bool:
    """Let Megatron-Core run on the CPU; return whether anything was patched (False with CUDA)."""
    if has_cuda():
        return False
    if _installed:
        return True
    # Numbers below 1e-38 (gradients of rare tokens, Adam's squares of them) take a CPU a hundred cycles each; GPUs
    # flush them too. Set before the first parallel operation: worker threads inherit it when they are made.
    torch.set_flush_denormal(True)
    for name, value in _cuda_surface().items():
        _replace(torch.cuda, name, value)
    _replace(torch.cuda.random, "get_rng_state", lambda *a, **k: torch.default_generator.get_state())
    _replace(
        torch.cuda.random, "set_rng_state", lambda state, *a, **k: torch.default_generator.set_state(state)
    )
    _replace(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)
    distributed = torch.distributed
    _replace(distributed, "all_to_all_single", _all_to_all_single(distributed.all_to_all_single))
    _replace(distributed, "all_gather", _all_gather(distributed.all_gather))
    _replace(distributed, "init_process_group", _init_process_group(distributed.init_process_group))
    with _without_compile():
        _module("megatron.core")
    mode = _CudaToCpu()
    mode.__enter__()
    _installed.append(mode)
    _patch_core()
    return True


@contextlib.contextmanager
def _without_compile() -> Iterator[None]:
    """Let torch.compile return what it is given, and Megatron keep that as its `jit_fuser` (core/jit.py:21).

    Megatron's package decorates its small fusions with it while it is imported (core/__init__.py:5,
    fusions/fused_bias_geglu.py:16), before `megatron.core.jit.disable_jit_fuser` can be called. That alone loads
    torch's compiler, a third of the start of each process; compiling costs minutes on a CPU and changes no number.
    """
    original = torch.compile
    _replace(torch, "compile", lambda function=None, **_: _same if function is None else function)
    try:
        yield
    finally:
        _replace(torch, "compile", original)


def _same(function: Any) -> Any:
    return function


def _patch_core() -> None:
    """Patch megatron.core itself: the RNG tracker's device states and the compile step of the data helpers."""
    random = _module("megatron.core.tensor_parallel.random")
    _replace(random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.default_generator.get_state())
    _replace(
        random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.default_generator.set_state(state)
    )
    # With one generator for "CPU" and "CUDA" the tracker's warning that the CPU's state changed is always true.
    logging.getLogger(random.__name__).addFilter(_is_not_rng_warning)
    # The wheel ships the compiled helper but no Makefile: the call would end the process (initialize.py:176).
    _replace(_module("megatron.core.datasets.utils"), "compile_helpers", lambda: None)


def _is_not_rng_warning(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def install_training() -> None:
    """Let `megatron.training.pretrain` start without CUDA (training/initialize.py:64)."""
    if not install():
        return
    training = _module("megatron.training.training")
    _replace(
        training,
        "initialize_megatron",
        functools.partial(training.initialize_megatron, allow_no_cuda=True),
    )
    _replace(training, "get_megatron_optimizer", _with_fused_adam(training.get_megatron_optimizer))


def _with_fused_adam(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let torch's Adam run its fused CPU kernel, which reads each parameter once instead of ten times."""

    @functools.wraps(original)
    def get_megatron_optimizer(*args: Any, **kwargs: Any) -> Any:
        optimizer = original(*args, **kwargs)
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            for group in part.param_groups if isinstance(part.optimizer, torch.optim.Adam) else ():
                group.update(fused=True, foreach=False)
        return optimizer

    return get_megatron_optimizer


def _module(name: str) -> ModuleType:
    return importlib.import_module(name)


@contextlib.contextmanager
def one_process_group() -> Iterator[None]:
    """A gloo (or nccl) process group of this process alone, with Megatron's parallel state, for tools and tests."""
    install()
    parallel_state = _module("megatron.core.parallel_state")
    seeds = _module("megatron.core.tensor_parallel.random")
    store = torch.distributed.HashStore()
    backend = "nccl" if has_cuda() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        seeds.model_parallel_cuda_manual_seed(1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()

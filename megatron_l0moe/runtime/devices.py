"""The GPUs and cores that this machine offers, asked without torch, whose import takes seconds."""

import os
from collections.abc import Callable
from typing import Any


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> int:
    """Return the number of GPUs that CUDA would show to a process started here; 0 without NVIDIA's driver."""
    return len(visible_gpu_names())


def gpu_share(place: int, size: int) -> dict[str, str]:
    """Return the variable that shows a process only the GPUs `place * size` ... `place * size + size - 1` of ours.

    Nothing where there are no GPUs, so that jobs side by side share the CPU.
    """
    names = visible_gpu_names()[place * size : (place + 1) * size]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names)} if names else {}


def visible_gpu_names() -> list[str]:
    """Return the numbers or UUIDs of the GPUs that CUDA would show to a process started here."""
    import pynvml  # the library of the driver is looked for only when it is asked

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        count = int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [str(device) for device in range(count)]
    names = [name.strip() for name in chosen.split(",")]
    if "-1" in names:
        names = names[: names.index("-1")]  # CUDA stops at the first name that is not a device
    return [name for name in names if name][:count]


def gpu_name() -> str | None:
    """Return what the driver calls the first visible GPU, such as `NVIDIA H100 80GB HBM3`; None without one.

    Not run on a GPU.
    """
    names = visible_gpu_names()
    if not names:
        return None
    import pynvml

    pynvml.nvmlInit()
    try:
        name = pynvml.nvmlDeviceGetName(gpu_handle(names[0]))
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    return name.decode() if isinstance(name, bytes) else str(name)  # bytes in older versions of nvidia-ml-py


def gpu_handle(name: str) -> Any:
    """Return NVML's handle of a GPU by its number or UUID; NVML has to be initialised."""
    import pynvml

    return (
        pynvml.nvmlDeviceGetHandleByIndex(int(name))
        if name.isdigit()
        else pynvml.nvmlDeviceGetHandleByUUID(name)
    )


def energy_meter() -> Callable[[], float] | None:
    """Return a function that reads the energy the first visible GPU has used, in joules since its driver was loaded.

    None without a GPU, or where the GPU does not tell (before Volta). Not run on a GPU.
    """
    names = visible_gpu_names()
    if not names:
        return None
    import pynvml

    pynvml.nvmlInit()
    handle = gpu_handle(names[0])

    def joules() -> float:
        return (
            float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000.0
        )  # the driver counts millijoules

    try:
        joules()
    except pynvml.NVMLError:
        return None
    return joules

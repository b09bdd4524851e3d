"""The GPUs and cores that this machine offers, and what a measurement ran on; no torch, whose import takes seconds.

Power, memory, utilisation, clocks and temperature of a node's GPUs over time are read from NVIDIA's driver. One thread
of a node's first process appends to FOLDER/gpu/HOST.jsonl, one object for each GPU and sample:

| name | meaning |
|---|---|
| time | seconds since 1970, UTC |
| gpu | number or UUID, as in CUDA_VISIBLE_DEVICES |
| power | watts |
| memory | bytes in use, of all processes |
| utilization | percent of the last second or less in which a kernel ran |
| sm_clock, memory_clock | MHz |
| temperature | degrees Celsius |

A number that the driver does not give is null. Whatever fails here is logged once and never ends training. Not run on
a GPU.
"""

import contextlib
import json
import logging
import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


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


STOP_SECONDS = 5.0
"""How long training waits at its end for a sample that is being taken."""


@contextlib.contextmanager
def sampled(folder: Path, seconds: float) -> Iterator[None]:
    """Sample while the block runs, in the first process of each node that has GPUs; elsewhere do nothing.

    Args:
        folder: of the training stage.
        seconds: from one sample to the next; 0 for none.
    """
    thread = None
    stop = threading.Event()
    if seconds and os.environ.get("LOCAL_RANK", "0") == "0":
        thread = threading.Thread(
            target=_sample_until, args=(stop, folder / "gpu", seconds), name="gpu-sampling", daemon=True
        )
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if thread:
            thread.join(STOP_SECONDS)


def _sample_until(stop: threading.Event, folder: Path, seconds: float) -> None:
    """Sample now and then until `stop` is set; the last sample is taken at the end."""
    try:
        names = visible_gpu_names()
        if not names:
            return
        import pynvml

        pynvml.nvmlInit()
        try:
            handles = {name: gpu_handle(name) for name in names}
            silent: set[str] = set()
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"{socket.gethostname()}.jsonl").open("a", encoding="utf-8") as file:
                stopping = False
                while True:
                    for name, handle in handles.items():
                        file.write(json.dumps(_sample(pynvml, name, handle, silent)) + "\n")
                    file.flush()
                    if stopping:
                        return
                    stopping = stop.wait(seconds)
        finally:
            pynvml.nvmlShutdown()
    except Exception as error:  # a driver that fails, a full disk: training goes on
        logger.warning("The GPUs are not sampled any more (%s: %s).", type(error).__name__, error)


def _sample(nvml: Any, name: str, handle: Any, silent: set[str]) -> dict[str, float | str | None]:
    """Return one sample of one GPU; a sensor that cannot be read is null, and is named the first time."""
    readers: dict[str, Callable[[], float]] = {
        "power": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000.0,  # the driver counts milliwatts
        "memory": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
        "utilization": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "sm_clock": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_clock": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "temperature": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
    }
    sample: dict[str, float | str | None] = {"time": round(time.time(), 3), "gpu": name}
    for key, read in readers.items():
        try:
            sample[key] = read()
        except nvml.NVMLError as error:
            sample[key] = None
            if key not in silent:
                silent.add(key)
                logger.warning("GPU %s does not tell its %s (%s).", name, key, error)
    return sample


PACKAGES = ("torch", "transformers", "megatron-core", "numpy")


def describe_machine(*, device: str, threads: int) -> dict[str, object]:
    """Return processor model, cores this process may use, memory in GiB, device, threads, versions and UTC date."""
    return {
        "cpu": cpu_model(Path("/proc/cpuinfo")),
        "cores": usable_cores(),
        "memory_gib": memory_gib(Path("/proc/meminfo")),
        "device": device,
        "threads": threads,
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cpu_model(cpuinfo: Path) -> str:
    """Return the `model name` of /proc/cpuinfo, or what Python knows where there is none."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def memory_gib(meminfo: Path) -> float | None:
    """Return `MemTotal` of /proc/meminfo in GiB, or None where there is none."""
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key == "MemTotal":
                return round(int(value.split()[0]) / 2**20, 1)  # kB -> GiB
    return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

"""What a measurement ran on: processor, memory, versions, threads, date. Nothing that names a machine or a user."""

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_l0moe.runtime.gpus import usable_cores

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

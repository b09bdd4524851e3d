"""The GPUs of a machine, with a driver that is made up."""

import sys
import types
from collections.abc import Callable

import pytest

from megatron_l0moe.runtime import hardware


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Put a driver with a number of GPUs in place; None: there is no driver."""

    def put(count: int | None) -> None:
        class NVMLError(Exception):
            pass

        def start() -> None:
            if count is None:
                raise NVMLError

        fake = types.SimpleNamespace(
            NVMLError=NVMLError,
            nvmlInit=start,
            nvmlShutdown=lambda: None,
            nvmlDeviceGetCount=lambda: count,
        )
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return put


def test_no_driver(driver):
    driver(None)
    assert hardware.visible_gpus() == 0


@pytest.mark.parametrize(
    ("chosen", "number"),
    [(None, 4), ("", 0), ("0,2", 2), ("-1", 0), ("1,-1,2", 1), ("0,1,2,3,4,5", 4), ("GPU-8f2a,GPU-11bc", 2)],
)
def test_chosen_devices(driver, monkeypatch, chosen, number):
    driver(4)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert hardware.visible_gpus() == number


def test_each_place_has_gpus_of_its_own(driver, monkeypatch):
    driver(4)
    assert hardware.gpu_share(1, 2) == {"CUDA_VISIBLE_DEVICES": "2,3"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1,0")
    assert hardware.gpu_share(0, 1) == {"CUDA_VISIBLE_DEVICES": "3"}
    assert hardware.gpu_share(1, 1) == {"CUDA_VISIBLE_DEVICES": "1"}


def test_jobs_share_a_machine_without_gpus(driver):
    driver(None)
    assert hardware.gpu_share(1, 2) == {}


def test_energy_in_joules_of_the_first_visible_gpu(driver, monkeypatch):
    driver(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    fake = sys.modules["pynvml"]
    fake.nvmlDeviceGetHandleByIndex = lambda index: index
    fake.nvmlDeviceGetTotalEnergyConsumption = lambda handle: 5000 + handle
    meter = hardware.energy_meter()
    assert meter is not None
    assert meter() == pytest.approx(5.001)

    def refuse(handle: int) -> float:
        raise fake.NVMLError

    fake.nvmlDeviceGetTotalEnergyConsumption = refuse
    assert hardware.energy_meter() is None


def test_no_energy_without_a_gpu(driver):
    driver(None)
    assert hardware.energy_meter() is None


def test_name_of_the_first_visible_gpu(driver, monkeypatch):
    driver(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    fake = sys.modules["pynvml"]
    fake.nvmlDeviceGetHandleByIndex = lambda index: index
    fake.nvmlDeviceGetName = lambda handle: f"GPU {handle}".encode()
    assert hardware.gpu_name() == "GPU 1"
    fake.nvmlDeviceGetName = lambda handle: "NVIDIA H200"
    assert hardware.gpu_name() == "NVIDIA H200"

    def refuse(handle: int) -> str:
        raise fake.NVMLError

    fake.nvmlDeviceGetName = refuse
    assert hardware.gpu_name() is None


def test_no_name_without_a_gpu(driver):
    driver(None)
    assert hardware.gpu_name() is None

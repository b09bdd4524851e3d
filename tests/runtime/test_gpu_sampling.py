"""Samples of GPUs that are made up; not run on a GPU."""

import json
import logging
import socket
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_l0moe.runtime import hardware

PATIENCE = 20.0
Fake = types.SimpleNamespace


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Fake]:
    """Put a driver with a number of GPUs in place; its functions can be replaced."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def put(count: int) -> Fake:
        class NVMLError(Exception):
            pass

        fake = Fake(
            NVMLError=NVMLError,
            open=0,
            nvmlDeviceGetCount=lambda: count,
            nvmlDeviceGetHandleByIndex=lambda index: index,
            nvmlDeviceGetPowerUsage=lambda handle: 700_000 + handle,
            nvmlDeviceGetMemoryInfo=lambda handle: Fake(used=2**30),
            nvmlDeviceGetUtilizationRates=lambda handle: Fake(gpu=97, memory=50),
            nvmlDeviceGetClockInfo=lambda handle, kind: {1: 1980, 2: 2619}[kind],
            nvmlDeviceGetTemperature=lambda handle, sensor: 61,
            NVML_CLOCK_SM=1,
            NVML_CLOCK_MEM=2,
            NVML_TEMPERATURE_GPU=0,
        )

        def count_up(by: int) -> Callable[[], None]:
            def change() -> None:
                fake.open += by

            return change

        fake.nvmlInit, fake.nvmlShutdown = count_up(1), count_up(-1)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return put


def rows(folder: Path) -> list[dict[str, Any]]:
    file = folder / "gpu" / f"{socket.gethostname()}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_samples_of_every_gpu_until_the_end(driver: Callable[[int], Fake], tmp_path: Path) -> None:
    fake = driver(2)
    with hardware.sampled(tmp_path, 0.05):
        wait_for(lambda: len(rows(tmp_path)) >= 6)
    found = rows(tmp_path)
    assert [row["gpu"] for row in found[:4]] == ["0", "1", "0", "1"]
    assert {key: value for key, value in found[1].items() if key != "time"} == {
        "gpu": "1", "power": 700.001, "memory": 2**30, "utilization": 97, "sm_clock": 1980, "memory_clock": 2619,
        "temperature": 61,
    }  # fmt: skip
    assert abs(found[0]["time"] - time.time()) < 60
    assert fake.open == 0  # the driver was closed as often as it was opened
    assert not [thread for thread in threading.enumerate() if thread.name == "gpu-sampling"]


def test_a_short_block_gives_its_first_and_last_sample(driver: Callable[[int], Fake], tmp_path: Path) -> None:
    driver(1)
    with hardware.sampled(tmp_path, 1000.0):
        wait_for(lambda: len(rows(tmp_path)) == 1)
    assert len(rows(tmp_path)) == 2


@pytest.mark.parametrize(("rank", "seconds", "count"), [("1", 0.01, 1), ("0", 0.0, 1), ("0", 0.01, 0)])
def test_nothing_is_sampled(
    driver: Callable[[int], Fake],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rank: str,
    seconds: float,
    count: int,
) -> None:
    """Not by a second process of a node, not when it is not wanted, not without a GPU."""
    driver(count)
    monkeypatch.setenv("LOCAL_RANK", rank)
    with hardware.sampled(tmp_path, seconds):
        time.sleep(0.1)
    assert not (tmp_path / "gpu").exists()


def test_a_sensor_that_fails_is_named_once(
    driver: Callable[[int], Fake], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake = driver(1)

    def fail(handle: int) -> int:
        raise fake.NVMLError("Not Supported")

    fake.nvmlDeviceGetPowerUsage = fail
    with caplog.at_level(logging.WARNING), hardware.sampled(tmp_path, 0.01):
        wait_for(lambda: len(rows(tmp_path)) >= 3)
    assert all(row["power"] is None and row["temperature"] == 61 for row in rows(tmp_path))
    assert [record.message for record in caplog.records] == ["GPU 0 does not tell its power (Not Supported)."]


@pytest.mark.parametrize("fault", ["handle", "folder"])
def test_a_failure_never_ends_training(
    driver: Callable[[int], Fake], tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    fake = driver(1)

    def fail(index: int) -> int:
        raise fake.NVMLError("GPU is lost")

    if fault == "handle":
        fake.nvmlDeviceGetHandleByIndex = fail
    else:
        (tmp_path / "gpu").write_text("in the way")
    with caplog.at_level(logging.WARNING), hardware.sampled(tmp_path, 0.01):
        wait_for(lambda: bool(caplog.records))
    (record,) = caplog.records
    assert record.message.startswith("The GPUs are not sampled any more (")
    assert fake.open == 0


def test_training_errors_pass(driver: Callable[[int], Fake], tmp_path: Path) -> None:
    driver(1)
    with pytest.raises(RuntimeError, match="training"), hardware.sampled(tmp_path, 0.01):
        raise RuntimeError("training")
    assert not [thread for thread in threading.enumerate() if thread.name == "gpu-sampling"]

"""For all tests: their processes do not time this machine, and none leaves its floating-point mode to the next."""

import os
import signal
import sys

import pytest

pytest_plugins = ["small_corpora"]

# A measurement takes seconds and differs every time.
os.environ.setdefault("L0MOE_CPU_FLOPS", '{"float32": 1e11, "bfloat16": 1e10}')


# A shell starts background jobs with SIGINT ignored, and what they start ignores it too; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _denormals() -> None:
    """Keep numbers below 1e-38 in each test: `runtime.cpu.install` of an earlier one lets the CPU flush them."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)

"""The CPU runtime: nothing happens with CUDA, every patch is needed, a symbol that is gone is named.

Each case runs in a process of its own, since patches cannot be taken back.
"""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # most cases start a process with Megatron

BUILD_AND_STEP = """
import megatron_models as models, torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
with cpu.one_process_group():
    model = models.build("dense")
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3), [wrapped])
    models.logits(wrapped).sum().backward()
    wrapped.finish_grad_sync()
    print("step", optimizer.step()[0])
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": tests}
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=120,
    )


def test_a_training_step_runs_without_a_device():
    done = run(f"from megatron_l0moe.runtime import cpu\ncpu.install()\n{BUILD_AND_STEP}")
    assert "step True" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("removal", "failure"),
    [
        ("cpu._cuda_surface = lambda s=cpu._cuda_surface: {k: v for k, v in s().items() if k != 'current_device'}",
         "NVIDIA|CUDA"),
        ("cpu._CudaToCpu.__torch_function__ = lambda self, f, t, a=(), k=None: f(*a, **(k or {}))", "NVIDIA|CUDA"),
        ("cpu._tensor_type = lambda f, a, k: f(*a, **k)", "AssertionError|TypeError"),
    ],
    ids=["current_device", "device literals", "type names"],
)  # fmt: skip
def test_a_step_fails_without_each_patch(removal, failure):
    import re

    done = run(f"from megatron_l0moe.runtime import cpu\n{removal}\ncpu.install()\n{BUILD_AND_STEP}")
    assert done.returncode != 0
    assert re.search(failure, done.stderr), done.stderr[-2000:]


def test_a_symbol_that_is_gone_is_named():
    done = run(
        "from megatron_l0moe.runtime import cpu\nimport torch\ndel torch.cuda.set_stream\ncpu.install()"
    )
    assert "torch.cuda.set_stream is gone; runtime/cpu.py patches it" in done.stderr


def test_with_cuda_nothing_is_patched():
    done = run(
        "import torch\nfrom megatron_l0moe.runtime import cpu\n"
        "torch.cuda.is_available = lambda: True\nbefore = dict(vars(torch.cuda))\n"
        "print(cpu.install(), cpu.install_training(), dict(vars(torch.cuda)) == before)"
    )
    assert done.stdout.split() == ["False", "None", "True"], done.stderr


def test_platform_flags_do_not_overrule_the_user():
    done = run(
        "from megatron_l0moe.runtime.platform import platform_flags\n"
        "print(platform_flags(['--transformer-impl', 'x', '--distributed-backend=y'], moe=True))"
    )
    assert "--transformer-impl" not in done.stdout
    assert "--distributed-backend" not in done.stdout
    assert "'--moe-token-dispatcher-type', 'allgather'" in done.stdout


@pytest.mark.parametrize(
    "without", ["", "import contextlib\ncpu._without_compile = contextlib.nullcontext\n"]
)
def test_torchs_compiler_is_not_loaded(without):
    program = (
        "cpu.install()\nimport sys, megatron.training\nprint('torch._inductor.compile_fx' in sys.modules)"
    )
    done = run(f"from megatron_l0moe.runtime import cpu\n{without}{program}")
    assert done.stdout.split()[-1] == str(bool(without)), done.stderr[-2000:]


def test_torch_compiles_again_after_it():
    done = run(
        "import torch\ncompiler = torch.compile\nfrom megatron_l0moe.runtime import cpu\ncpu.install()\n"
        "print(torch.compile is compiler)"
    )
    assert done.stdout.split()[-1] == "True", done.stderr[-2000:]

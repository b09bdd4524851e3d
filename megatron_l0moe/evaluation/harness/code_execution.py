"""HumanEval's metric, pass@k (Chen et al. 2021, eq. 1), by running the programs in `code_sandbox.py`.

The harness' own metric is fetched from the hub when its task is loaded and runs the programs with the rights of
the user. The tasks that `tasks.py` writes name the functions of this module instead, online and offline.
"""

import functools
import math
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.evaluation.harness import code_sandbox

SECONDS = 3.0
"""Wall clock of one program; the harness' own limit."""
MEMORY_MIB = 1024
"""Address space of one program, the interpreter included."""
START_SECONDS = 60.0
"""What the interpreter and the isolation may take on top of the program's time."""
FENCE = "```"


def describe() -> dict[str, object]:
    """Return how programs are run, for the results."""
    return {
        "allowed": True,
        "seconds": SECONDS,
        "memory_mib": MEMORY_MIB,
        "processes": 1,
        "network": "none",
        "writable": f"an empty folder in memory of {code_sandbox.FOLDER_MIB} MiB",
    }


def run_program(program: str, *, seconds: float = SECONDS, memory_mib: int = MEMORY_MIB) -> str:
    """Run a program, isolated, and return `passed`, `failed: EXCEPTION` or `timed out`.

    Args:
        program: Python source; it passes when it reaches its end.
        seconds: wall clock that it may take.
        memory_mib: address space that it may take.

    Raises:
        L0MoEError: this machine does not let us isolate it; it was not run then.
    """
    with tempfile.TemporaryDirectory(prefix="l0moe-code-") as folder:
        # -I, -S: no environment variables, no site-packages; the source of this package is not in sys.path
        done = subprocess.run(
            [sys.executable, "-I", "-S", code_sandbox.__file__, folder, str(seconds), str(memory_mib)],
            input=program.encode("utf-8", errors="replace"),
            capture_output=True,
            timeout=seconds + START_SECONDS,
            check=False,
        )
    said = done.stdout.decode("utf-8", errors="replace").strip()
    if done.returncode == code_sandbox.SETUP_FAILED:
        raise L0MoEError(_refusal(said))
    if done.returncode != 0:
        last = done.stderr.decode("utf-8", errors="replace").strip().splitlines()
        raise L0MoEError(_refusal(last[-1] if last else f"exit code {done.returncode}"))
    return said


@functools.cache
def check_available() -> None:
    """Refuse a machine on which model output cannot be run in isolation, by running a program that does nothing."""
    if sys.platform != "linux" or platform.machine() not in code_sandbox.ARCHITECTURES:
        raise L0MoEError(
            _refusal(f"Linux on {' or '.join(code_sandbox.ARCHITECTURES)}; this is {platform.platform()}")
        )
    if (verdict := run_program("pass", seconds=START_SECONDS)) != "passed":
        raise L0MoEError(_refusal(f"an empty program {verdict}"))


def pass_at_k(
    references: Sequence[str], predictions: Sequence[Sequence[str]], k: int | Sequence[int] = 1
) -> dict[str, float]:
    """Return `{"pass@K": probability}` of one problem.

    Args:
        references: one test, which calls `check` on the wanted function.
        predictions: the n programs that were generated for it, one or more.
        k: programs of which one has to pass; values above n are left out, as the harness does.
    """
    programs = [f"{candidate}\n{references[0]}" for candidate in predictions[0]]
    passed = sum(run_program(program) == "passed" for program in programs)
    wanted = [k] if isinstance(k, int) else k
    return {f"pass@{size}": estimate(len(programs), passed, size) for size in wanted if size <= len(programs)}


def estimate(n: int, passed: int, k: int) -> float:
    """Return the unbiased estimate of pass@k, 1 - C(n - passed, k) / C(n, k)."""
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)


def build_predictions(resps: list[list[str]], docs: list[dict[str, str]]) -> list[list[str]]:
    """Put each problem's prompt before its completions."""
    return [[doc["prompt"] + completion for completion in row] for row, doc in zip(resps, docs, strict=True)]


def build_predictions_instruct(resps: list[list[str]], docs: list[dict[str, str]]) -> list[list[str]]:
    """Put each problem's prompt before its completions, which end where the code block is closed."""
    cut = [[completion.split(FENCE, 1)[0] for completion in row] for row in resps]
    return build_predictions(cut, docs)


def _refusal(missing: str) -> str:
    return (
        f"HumanEval runs code that the model wrote, and this machine cannot isolate it ({missing}); use one that "
        "permits user and network namespaces, such as a container started with --privileged, or leave HumanEval out."
    )

"""A model in vLLM for `timing.time_pairs`, in a process of its own with the Python of the serving environment."""

import contextlib
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.evaluation.bench import vllm_worker
from megatron_l0moe.evaluation.timing import EnergyMeter, Mode, Sample, Windows

SERVE_PYTHON = Path(".venv-serve/bin/python")
STOP_SECONDS = 20.0
KV_CACHE_GIB = 1
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
}
"""No network, no statistics; on a GPU the last is not read."""


class VllmRunner:
    """Loads a checkpoint folder on entering, and times requests.

    Decoding goes on with tokens that vLLM draws itself, prefill with the text of the mode.

    Args:
        folder: a Hugging Face checkpoint.
        settings: further arguments of `vllm.LLM`.
        python: of an environment that has vLLM.
        threads: of each matrix product.
        log: file for what vLLM prints.
        energy: meter of the GPU, None without one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        settings: Mapping[str, object],
        python: Path,
        threads: int,
        log: Path,
        energy: EnergyMeter | None = None,
    ) -> None:
        if not python.is_file():
            raise L0MoEError(
                f"vLLM's environment ({python}) does not exist; make it with `make serve-setup`, or give "
                "--engine transformers."
            )
        self.versions: dict[str, str] = {}
        self._settings = {"model": str(folder), **settings}
        self._python, self._threads, self._log, self._energy = python, threads, log, energy
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        read, write = os.pipe()
        # Not resolved: a venv's python is a link, and what it links to knows nothing of the venv.
        command = [
            str(self._python.absolute()),
            str(vllm_worker.__file__),
            json.dumps(self._settings),
            str(write),
        ]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(write,),
                env=worker_environment(self._threads),
                text=True,
            )
        os.close(write)
        self._replies = os.fdopen(read, encoding="utf-8")
        self.versions = self._reply()["versions"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def __call__(self, tokens: Windows, mode: Mode) -> Sample:
        """Run the mode once."""
        steps = mode.tokens if mode.is_decode else 0
        prompts = [list(row[: mode.prompt or mode.tokens]) for row in tokens]
        sample = self._ask({"do": "start", "prompts": prompts, "steps": steps})
        if not mode.is_decode:
            return sample
        return self._ask({"do": "steps"})

    def profile(self, tokens: Windows, mode: Mode) -> list[tuple[str, float]]:
        """Return [(operation, own CPU seconds)] of the whole request, the longest first."""
        prompts = [list(row[: mode.prompt or mode.tokens]) for row in tokens]
        steps = mode.tokens if mode.is_decode else 0
        self._send({"do": "profile", "prompts": prompts, "steps": steps})
        return [(name, seconds) for name, seconds in self._reply()["operations"]]

    def _ask(self, request: dict[str, object]) -> Sample:
        before = self._energy() if self._energy else 0.0
        self._send(request)
        seconds = float(self._reply()["seconds"])
        return Sample(seconds=seconds, joules=self._energy() - before if self._energy else None)

    def _send(self, request: dict[str, object]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError as error:
            raise self._failed() from error

    def _reply(self) -> dict[str, Any]:
        line = self._replies.readline()
        if not line:
            raise self._failed()
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _end(self) -> None:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._replies.close()

    def _failed(self) -> L0MoEError:
        self._end()  # its last words are in the log only then
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return L0MoEError(
            f"vLLM ended while it ran {self._settings['model']} (last line: {lines[-1] if lines else 'none'}); "
            f"see {self._log}."
        )


def worker_environment(threads: int) -> dict[str, str]:
    """Return the environment of a process of vLLM: ours without what is meant for our own Python."""
    ours = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    pinned = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # As many as the variables above say, on any core.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # The engine in the worker's own process: its steps are timed one by one.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    return {**ours, **QUIET, **pinned}

"""vLLM's OpenAI-compatible server on a free loopback port, and one completion request to it."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.evaluation.bench.vllm_runner import worker_environment

HEALTH_SECONDS = 300.0
REQUEST_SECONDS = 120.0
STOP_SECONDS = 20.0
MAX_TOKENS = 256
"""Of prompt and answer together."""
SERVED_NAME = "l0moe"


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What the server answered: the log-probability of every token but the first, greedy tokens at the end."""

    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of tokens 1, 2, ... of prompt and answer."""
    text: str


class ServerError(L0MoEError):
    """The server did not start, ended, or refused the request."""


@contextmanager
def serve(model: Path, *, python: Path, log: Path, threads: int = 1) -> Iterator[str]:
    """Start the server, wait until it is healthy, give its address, and end its whole process group.

    Raises:
        ServerError: it ended or was not healthy in time; names the log.
    """
    port = free_port()
    command = [
        *(str(python.absolute()), "-m", "vllm.entrypoints.openai.api_server"),
        *(
            "--model",
            str(model),
            "--served-model-name",
            SERVED_NAME,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ),
        *("--dtype", "float32", "--max-model-len", str(MAX_TOKENS), "--max-num-seqs", "4", "--enforce-eager"),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**worker_environment(threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(address, process, log)
        yield address
    finally:
        stop(process)


def complete(address: str, prompt: str | list[int], tokens: int) -> Completion:
    """Ask for a greedy completion with the log-probabilities of prompt and answer.

    Args:
        address: of the server.
        prompt: text, or token ids.
        tokens: to generate, whatever they are.

    Raises:
        ServerError: it answered with an error.
    """
    request = {
        "model": SERVED_NAME,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "logprobs": 0,
        "prompt_logprobs": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    return read_completion(_post(f"{address}/v1/completions", request))


def read_completion(answer: dict[str, Any]) -> Completion:
    """Read the server's answer."""
    choice = answer["choices"][0]
    prompt = tuple(choice["prompt_token_ids"])
    # One entry for each position: {token id: {"logprob": ...}} of the token there; null for the first.
    of_prompt = [
        entry[str(token)]["logprob"]
        for token, entry in zip(prompt, choice["prompt_logprobs"], strict=True)
        if entry
    ]
    logprobs = [
        float("nan") if value is None else value
        for value in (*of_prompt, *choice["logprobs"]["token_logprobs"])
    ]
    return Completion(
        prompt=prompt, generated=tuple(choice["token_ids"]), logprobs=tuple(logprobs), text=choice["text"]
    )


def free_port() -> int:
    """Return a port of the loopback interface that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End the process and all that it started: they are one process group."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            return
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue


def _wait_until_healthy(address: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + HEALTH_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"vLLM's server ended with code {process.returncode} at its start; see {log}.")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:  # noqa: S310
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.5)
    raise ServerError(f"vLLM's server was not healthy after {HEALTH_SECONDS:.0f} s; see {log}.")


def _post(address: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(  # noqa: S310
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as answer:  # noqa: S310
            result: dict[str, Any] = json.loads(answer.read())
            return result
    except urllib.error.HTTPError as error:
        text = " ".join(error.read().decode(errors="replace").split())[:300]
        raise ServerError(f"vLLM's server answered with {error.code}: {text}") from error
    except OSError as error:
        raise ServerError(f"vLLM's server did not answer: {error}") from error

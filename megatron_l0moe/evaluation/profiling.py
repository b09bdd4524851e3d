"""Where the time of one run goes: own CPU time by operation, from torch's profiler."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile

SHOWN = 8


@dataclass(frozen=True)
class Operations:
    """Own CPU seconds of each operation, the longest first."""

    seconds: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, seconds: Iterable[tuple[str, float]]) -> "Operations":
        """Sort."""
        return cls(tuple(sorted(seconds, key=lambda item: -item[1])))

    def shares(self, shown: int = SHOWN) -> dict[str, float]:
        """Return the shares of the longest operations, and of all others together."""
        total = sum(seconds for _, seconds in self.seconds) or 1.0
        shares = {name: seconds / total for name, seconds in self.seconds[:shown]}
        return {**shares, "others": max(0.0, 1.0 - sum(shares.values()))}

    def to_json(self) -> dict[str, object]:
        """Return total and shares as plain dicts."""
        return {"seconds": sum(seconds for _, seconds in self.seconds), "shares": self.shares()}


def profile_transformers(run: Callable[[], object]) -> Operations:
    """Run once under the profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else each start and stop is a line on the terminal
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return Operations.of((event.key, event.self_cpu_time_total / 1e6) for event in profiler.key_averages())

"""Progress lines for the long loops of the data side."""

import logging
import time

INTERVAL_SECONDS = 5.0


class Progress:
    """Logs done/total, rate and time left at most every ``INTERVAL_SECONDS``."""

    def __init__(self, logger: logging.Logger, what: str, total: int | None = None) -> None:
        self._logger = logger
        self._what = what
        self._total = total
        self._done = 0
        self._start = self._last = time.monotonic()

    def advance(self, count: int = 1) -> None:
        """Count ``count`` more items and log if it is time to."""
        self._done += count
        now = time.monotonic()
        if now - self._last < INTERVAL_SECONDS:
            return
        self._last = now
        rate = self._done / (now - self._start)
        if self._total is None or not self._done:
            self._logger.info("%s: %d (%.0f/s)", self._what, self._done, rate)
            return
        left = max(self._total - self._done, 0) / rate
        self._logger.info(
            "%s: %d/%d (%.0f/s, about %.0f s left)", self._what, self._done, self._total, rate, left
        )

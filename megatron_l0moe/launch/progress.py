"""What a person sees while the chain runs: one live line on a terminal, plain lines in a file."""

import re
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from megatron_l0moe.launch import estimate
from megatron_l0moe.launch.forecast import Forecast
from megatron_l0moe.launch.stages import Run, StageSpec

PLAIN_SECONDS = 20.0
"""Between two status lines when the output is not a terminal."""
LIVE_SECONDS = 1.0
OUR_MESSAGE = re.compile(r"\d\d:\d\d:\d\d \| (.*)")
"""A line of our own in a log, see `cli`; progress bars of other libraries have strokes too."""


class Progress:
    """Shows the chain's position; call `tick` often."""

    def __init__(
        self,
        run: Run,
        selected: tuple[StageSpec, ...],
        console: Console | None = None,
        *,
        forecast: Forecast | None = None,
    ) -> None:
        """Start the clock of the whole command; `forecast` is what the stages will take, if that is known."""
        self._run = run
        self._names = tuple(spec.name for spec in selected)
        self._console = console or Console(highlight=False)
        self._forecast = forecast
        self._live: Live | None = None
        self._started = time.monotonic()
        self._shown = 0.0
        self._stage_started = 0.0
        self._log_start = 0

    def done_before(self, spec: StageSpec) -> None:
        """Say that a stage needs no work."""
        self.say(f"{self._title(spec)}  done before")

    def start(self, spec: StageSpec) -> None:
        """Say what the next stage does."""
        self.say(f"{self._title(spec)}  {spec.does}")
        self._stage_started = self._shown = time.monotonic()
        log = self._run.log_file(spec.name)
        self._log_start = log.stat().st_size if log.is_file() else 0
        if self._console.is_terminal:
            # No refresh thread: the process that starts children must have one thread only.
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()

    def tick(self, spec: StageSpec) -> None:
        """Refresh the status line when it is time to."""
        now = time.monotonic()
        if now - self._shown < (LIVE_SECONDS if self._live else PLAIN_SECONDS):
            return
        self._shown = now
        line = self.status(spec)
        if self._live:
            self._live.update(Text(f"    {line}", overflow="ellipsis", no_wrap=True), refresh=True)
        else:
            self.say(f"    {line}")

    def finish(self, spec: StageSpec) -> None:
        """Say that the stage has ended well."""
        self.stop()
        spent = estimate.words(time.monotonic() - self._stage_started)
        self.say(f"    {spec.name} done in {spent}")

    def stop(self) -> None:
        """Take the live line away."""
        if self._live:
            self._live.stop()
            self._live = None

    def say(self, line: str) -> None:
        """Print one line below the finished stages."""
        self._console.print(line, soft_wrap=True, markup=False)

    def status(self, spec: StageSpec) -> str:
        """Return position, time spent and time left as one line."""
        so_far = estimate.words(time.monotonic() - self._started)
        at = estimate.Position(
            spent=time.monotonic() - self._stage_started,
            message=last_message(self._run.log_file(spec.name), self._log_start),
        )
        names = self._names[self._names.index(spec.name) :]
        left = estimate.seconds_left(self._run, names, self._forecast, at)
        remaining = "time left known once training starts"
        if left is not None:
            remaining = f"about {estimate.words(left)} left"
        return f"{self._position(spec)}, {so_far} so far, {remaining}"

    def _position(self, spec: StageSpec) -> str:
        if spec.name == "experts" and self._run.recipe.construction is None:
            runs = estimate.experts(self._run)
            left = [k for k, r in enumerate(runs) if r.done < r.steps] or [len(runs) - 1]
            now = left[: self._run.recipe.expert_training.at_once]
            return "; ".join(f"expert {k + 1} of {len(runs)}, {_steps(runs[k])}" for k in now)
        if spec.name == "moe":
            return _steps(estimate.moe(self._run))
        return last_message(self._run.log_file(spec.name), self._log_start) or "working"

    def _title(self, spec: StageSpec) -> str:
        return f"stage {self._names.index(spec.name) + 1} of {len(self._names)}  {spec.name:<9}"


def last_message(log: Path, start: int = 0) -> str:
    """Return the last of our own messages in a log from the offset `start`, without its time."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(start, size - 8192))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    ours = [found[1] for line in lines if (found := OUR_MESSAGE.match(line))]
    return ours[-1].strip()[:100] if ours else ""


def _steps(position: estimate.Training) -> str:
    if position.seconds_per_step is None:
        return "starting"
    return f"step {position.done} of {position.steps}, {position.seconds_per_step:.2f} s a step"

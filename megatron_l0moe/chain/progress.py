"""What a person sees while the chain runs: one live line on a terminal, plain lines in a file, and the time left.

Once training steps were timed, they give the time of all steps that are left; a stage whose steps were not timed yet
borrows the time per token of one whose were, weighted by what a token costs there. Everything else is the forecast's
(see `forecast.py`), stretched by how much slower or faster this machine turned out to be than it. The stage under way
tells by its own messages how much of it is done. Where there is no forecast, nothing is claimed before the first step.
"""

import json
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from megatron_l0moe.chain.forecast import COMMAND_SECONDS, JOB_SECONDS, Forecast, Parts
from megatron_l0moe.runs.stage_folder import MARKER, read_manifest
from megatron_l0moe.runs.stages import Run, StageSpec, folders

RECENT_STEPS = 20
LEAST_SHARE = 0.1
"""Of a stage that takes longer than was forecast, what is said to be left; and what has to be done before it counts."""
MOST_OFF = 5.0
"""Times that a stage may turn out slower or faster than was forecast."""
TAIL_BYTES = 1 << 18
SHOWN = ("iteration", "seconds", "lm_loss")
"""What a row of metrics.jsonl is read for; one that holds something else there is damaged."""
EVALUATION_COST = 1.0
"""Held-out tokens pass three models forwards only, and a forward pass is a third of a training step."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Position of one training job."""

    done: int
    """Finished steps."""
    steps: int
    seconds_per_step: float | None
    """Median of the last steps; None before the first."""
    loss: float | None = None
    """The last step's loss in nats a token."""


def training(folder: Path, steps: int) -> Training:
    """Read the position of a training job from its metrics.jsonl."""
    path = folder / "metrics.jsonl"
    rows = _tail(path) if path.is_file() else []
    times = [row["seconds"] for row in rows if isinstance(row.get("seconds"), int | float)][-RECENT_STEPS:]
    last = rows[-1].get("iteration", 0) if rows else 0
    done = steps if (folder / MARKER).is_file() else min(int(last), steps)
    return Training(
        done=done,
        steps=steps,
        seconds_per_step=statistics.median(times) if times else None,
        loss=rows[-1].get("lm_loss") if rows else None,
    )


def experts(run: Run) -> list[Training]:
    """Return the positions of the K expert runs."""
    steps = run.recipe.expert_steps
    return [training(run.expert_folder(k), steps) for k in range(run.recipe.model.num_experts)]


def moe(run: Run) -> Training:
    """Return the position of MoE training."""
    return training(run.stage_folder("moe"), run.recipe.moe_steps)


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where the stage under way is."""

    spent: float = 0.0
    """Seconds since it was started by this command."""
    message: str = ""
    """Its last message, such as `embedded documents: 160/1299 (7/s)`."""


def seconds_left(
    run: Run, names: tuple[str, ...], forecast: Forecast | None = None, at: Position | None = None
) -> float | None:
    """Estimate the time that the stages `names` still take.

    Args:
        names: the stage under way first.
        forecast: of the whole run; None where there is none, as on GPUs.
        at: where the stage under way is; None: it has not begun.

    Returns:
        Seconds; None without a forecast while no training step was measured.
    """
    rates = _Rates(run, forecast)
    if rates.known is None:
        return None
    left = 0.0
    for name in names:
        if all(_done(folder) for folder in folders(run, name)):
            continue
        if name == "experts" and run.recipe.construction is None:
            left += _experts_left(run, rates)
        elif name == "moe":
            left += _moe_left(run, rates)
        elif forecast is not None:
            stretched = {part: rates.pace * seconds for part, seconds in forecast.stages[name].items()}
            left += _part_left(stretched, at or Position()) if name == names[0] else sum(stretched.values())
        elif name == "evaluate":
            left += _heldout_tokens(run) * EVALUATION_COST * rates.known
    return left


class _Rates:
    """Seconds of a training token: measured where steps were timed, else forecast or borrowed."""

    def __init__(self, run: Run, forecast: Forecast | None) -> None:
        tokens = _step_tokens(run)
        steps = [r.seconds_per_step for r in experts(run) if r.seconds_per_step is not None]
        moe_step = moe(run).seconds_per_step
        measured = {
            "experts": statistics.median(steps) / tokens["experts"] if steps else None,
            "moe": None if moe_step is None else moe_step / tokens["moe"],
        }
        paces = [rate / forecast.per_token[name] for name, rate in measured.items() if rate and forecast]
        self.pace = paces[-1] if paces else 1.0
        """How much longer things take here than was forecast."""
        self.known = next((rate for rate in (measured["moe"], measured["experts"]) if rate is not None), None)
        """The rate of some stage whose steps were timed, or forecast; None: nothing is known."""
        if forecast is not None:
            self._rates = {n: m or self.pace * forecast.per_token[n] for n, m in measured.items()}
            self.known = self.known or self._rates["moe"]
        else:
            self._rates = {n: m or self.known or 0.0 for n, m in measured.items()}

    def of(self, name: str) -> float:
        """Return the seconds of a token of one job of a stage."""
        return self._rates[name]


def _experts_left(run: Run, rates: _Rates) -> float:
    runs, count = experts(run), run.recipe.model.num_experts
    jobs = sum(not _done(run.expert_folder(k)) for k in range(count))
    steps = sum(r.steps - r.done for r in runs)
    alone = steps * _step_tokens(run)["experts"] * rates.of("experts") + jobs * _start_up(run)
    return alone / max(min(run.recipe.expert_training.at_once, jobs), 1)


def _moe_left(run: Run, rates: _Rates) -> float:
    position = moe(run)
    steps = (position.steps - position.done) * _step_tokens(run)["moe"] * rates.of("moe")
    return steps + (_start_up(run) if not position.done else 0.0)


def _part_left(parts: Parts, at: Position) -> float:
    """Return what is left of a stage, from the part and the count in its last message."""
    total, before = sum(parts.values()), 0.0
    for name, seconds in parts.items():
        if at.message.startswith(name) and (count := re.search(r"(\d+)(?:/| of )(\d+)", at.message)):
            share = min(int(count[1]) / max(int(count[2]), 1), 1.0)
            before += share * seconds
            pace = at.spent / before if before > LEAST_SHARE * total else 1.0
            return (total - before) * min(max(pace, 1 / MOST_OFF), MOST_OFF)
        before += seconds
    return max(total - at.spent, LEAST_SHARE * total)


def _step_tokens(run: Run) -> dict[str, int]:
    recipe = run.recipe
    return {
        "experts": recipe.data.seq_length * recipe.expert_training.global_batch_size,
        "moe": recipe.data.seq_length * recipe.moe_global_batch_size,
    }


def words(seconds: float) -> str:
    """Word a duration: `40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{max(round(seconds), 0)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _start_up(run: Run) -> float:
    """Seconds of an expert job outside of its steps: median of those that are finished, before that a guess."""
    overheads = []
    for k in range(run.recipe.model.num_experts):
        folder = run.expert_folder(k)
        numbers = read_manifest(folder).get("numbers")
        process = numbers.get("process") if isinstance(numbers, dict) else None
        path = folder / "metrics.jsonl"
        if isinstance(process, dict) and path.is_file():
            stepping = sum(float(row.get("seconds", 0.0)) for row in _tail(path))
            overheads.append(max(float(process.get("seconds", 0.0)) - stepping, 0.0))
    return statistics.median(overheads) if overheads else COMMAND_SECONDS + JOB_SECONDS


def _heldout_tokens(run: Run) -> int:
    path = run.stage_folder("curate") / "heldout.jsonl"
    if not path.is_file():
        return run.recipe.data.heldout_tokens_per_domain * run.recipe.model.num_experts
    with path.open("rb") as file:
        return sum(1 for _ in file) * run.recipe.data.seq_length


def _done(folder: Path) -> bool:
    return (folder / MARKER).is_file()


def _tail(path: Path) -> list[dict[str, float]]:
    """Return the last rows of a metrics file; a line that is being written now is left out."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().split(b"\n")
    rows = []
    for line in lines[1:-1] if size > TAIL_BYTES else lines[:-1]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and all(isinstance(row.get(name, 0), int | float) for name in SHOWN):
            rows.append(row)
    return rows


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
        spent = words(time.monotonic() - self._stage_started)
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
        so_far = words(time.monotonic() - self._started)
        at = Position(
            spent=time.monotonic() - self._stage_started,
            message=last_message(self._run.log_file(spec.name), self._log_start),
        )
        names = self._names[self._names.index(spec.name) :]
        left = seconds_left(self._run, names, self._forecast, at)
        remaining = "time left known once training starts"
        if left is not None:
            remaining = f"about {words(left)} left"
        return f"{self._position(spec)}, {so_far} so far, {remaining}"

    def _position(self, spec: StageSpec) -> str:
        if spec.name == "experts" and self._run.recipe.construction is None:
            runs = experts(self._run)
            left = [k for k, r in enumerate(runs) if r.done < r.steps] or [len(runs) - 1]
            now = left[: self._run.recipe.expert_training.at_once]
            return "; ".join(f"expert {k + 1} of {len(runs)}, {_steps(runs[k])}" for k in now)
        if spec.name == "moe":
            return _steps(moe(self._run))
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


def _steps(position: Training) -> str:
    if position.seconds_per_step is None:
        return "starting"
    return f"step {position.done} of {position.steps}, {position.seconds_per_step:.2f} s a step"

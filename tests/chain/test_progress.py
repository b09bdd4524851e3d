"""Positions and times by hand: 4 experts of 10 steps of 64 tokens, 20 MoE steps of 128 tokens."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from toy_recipe import make_run

from megatron_l0moe.chain import progress as estimate
from megatron_l0moe.chain.progress import Progress, last_message
from megatron_l0moe.runs.stages import CHAIN, STAGE_NAMES, Run


def write_steps(folder: Path, count: int, seconds: float, *, done: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"iteration": i + 1, "seconds": seconds}) + "\n" for i in range(count)]
    (folder / "metrics.jsonl").write_text("".join(rows) + '{"iteration": 99, "seco')  # half a line
    if done:
        (folder / "manifest.json").write_text(
            json.dumps({"numbers": {"process": {"seconds": count * seconds + 7.0}}})
        )
        (folder / "DONE").write_text("x")


def test_nothing_measured_nothing_claimed(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert estimate.seconds_left(run, STAGE_NAMES) is None
    console = Console(record=True, width=200)
    progress = Progress(run, CHAIN, console)
    assert "time left known once training starts" in progress.status(CHAIN[0])


def test_by_hand(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_steps(run.expert_folder(0), 10, 2.0, done=True)
    write_steps(run.expert_folder(1), 4, 2.0)
    # 6 + 10 + 10 steps of 2 s, three jobs with 7 s around the steps; MoE: 20 steps, twice the tokens, and 7 s.
    experts, moe = 26 * 2.0 + 3 * 7.0, 20 * 4.0 + 7.0
    assert estimate.seconds_left(run, ("experts",)) == pytest.approx(experts)
    assert estimate.seconds_left(run, ("experts", "assemble", "moe")) == pytest.approx(experts + moe)


def test_measured_moe_rate_replaces_the_borrowed_one(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for k in range(4):
        write_steps(run.expert_folder(k), 10, 2.0, done=True)
    write_steps(run.stage_folder("moe"), 5, 1.0)
    assert estimate.seconds_left(run, ("moe",)) == pytest.approx(15 * 1.0)  # it has started: the 7 s are over


def test_heldout_tokens_count_for_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_steps(run.stage_folder("moe"), 20, 1.28, done=True)
    run.stage_folder("curate").mkdir(parents=True)
    (run.stage_folder("curate") / "heldout.jsonl").write_text("{}\n" * 10)
    assert estimate.seconds_left(run, ("evaluate",)) == pytest.approx(10 * 32 * 1.28 / 128)


def test_half_a_line_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_steps(run.expert_folder(0), 3, 2.0)
    position = estimate.experts(run)[0]
    assert (position.done, position.steps, position.seconds_per_step) == (3, 10, 2.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (40, "40 s"), (100, "2 min"), (3600, "60 min"), (12000, "3 h 20 min")]
)
def test_words(seconds: float, text: str) -> None:
    assert estimate.words(seconds) == text


def test_status_lines(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_steps(run.expert_folder(0), 10, 2.0, done=True)
    write_steps(run.expert_folder(1), 4, 2.0)
    progress = Progress(run, CHAIN, Console(record=True, width=200))
    assert "expert 2 of 4, step 4 of 10, 2.00 s a step" in progress.status(CHAIN[2])
    # 73 s + 87 s, and four times 8192 held-out tokens at 2 s / 64 tokens: 1184 s
    assert "about 20 min left" in progress.status(CHAIN[2])
    assert "starting" in progress.status(CHAIN[4])


def test_own_messages_are_shown(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "12:00:00 | embedded 5/10\nsome library says hello\nLoading weights:  0%| | 0/272 [00:00<?, ?it/s]\n"
    )
    assert last_message(log) == "embedded 5/10"
    assert last_message(log, log.stat().st_size) == ""
    assert last_message(tmp_path / "none") == ""


def test_plain_output_has_no_control_characters(tmp_path: Path) -> None:
    run: Run = make_run(tmp_path)
    with (tmp_path / "out").open("w") as file:
        progress = Progress(run, CHAIN, Console(file=file, width=200))
        progress.start(CHAIN[0])
        progress.tick(CHAIN[0])
        progress.finish(CHAIN[0])
    text = (tmp_path / "out").read_text()
    assert text.startswith("stage 1 of 8  convert    turn the dense")
    assert "\x1b" not in text

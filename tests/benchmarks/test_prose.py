"""The pages of words about the reproduction: their numbers by hand, and the committed pages against the tables."""

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks" / "reproduction"))

import prose  # noqa: E402

from megatron_l0moe.errors import L0MoEError  # noqa: E402


def one(row: str, seed: int | None, overall: float, **more: Any) -> dict[str, Any]:
    per_domain = {"a": 2 * overall, "b": overall / 2}
    return {"row": row, "seed": seed, "perplexity": {"overall": overall, "per_domain": per_domain}, **more}


def numbers() -> prose.Numbers:
    phases = [
        {"name": "pretraining", "flops": 9e15},
        {"name": "experts", "flops": 3e12},
        {"name": "moe", "flops": 1e12},
    ]
    speed = {"prefill": {"ratio": {"median": 1.256}}}
    small = {"parameters": 3_000_000, "active_parameters": 500_000, "tokens": 819_200}
    rows = [
        one("base", None, 20.0, parameters=2_000_000, active_parameters=1_000_000),
        one("m", 1, 30.0, phases=phases, speed=speed, **small),
        one("m", 2, 26.0, phases=phases, **small),
        one("other", 1, 20.0, phases=phases[:2]),
        one("alone", 3, 20.0),
    ]  # fmt: skip
    controls = [{"control": "held", "frozen_loss": loss, "largest_distance": 0.5} for loss in (4.0, 4.2)]
    main = {"results": rows, "controls": controls}
    return prose.Numbers({"reproduction": main, "second": {"results": rows[:1]}})


def test_numbers_by_hand() -> None:
    n = numbers()
    # 1.5 and 1.3
    assert n.ratio("m") == "1.400 +- 0.141"
    assert n.ratio("m", domain="a") == n.ratio("m")
    assert n.ratio("m", "other") == "1.500"  # seed 1 alone is in both
    assert n.ratio("other", "m") == "0.667"
    assert n.perplexity("m") == "28.0"
    assert n.perplexity("base", page="second") == "20.0"
    assert (n.seeds("m"), n.speed("m", "prefill"), n.active("m")) == (2, "1.26", "50 %")
    assert (n.size("m"), n.tokens("m"), n.parameters("m")) == ("1.50", "0.82", "3.0")
    assert n.flops("m", "other") == "1.33"
    assert n.control("held") == "4.100 +- 0.141"
    assert n.control("held", "largest_distance") == "0.500 +- 0.000"


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(L0MoEError, match="row 'none' of reproduction, which has base, m, other, alone"):
        numbers().ratio("none")
    with pytest.raises(L0MoEError, match="page 'third'; there are reproduction, second"):
        numbers().ratio("m", page="third")
    with pytest.raises(L0MoEError, match="no seed in common"):
        numbers().ratio("m", "alone")
    with pytest.raises(L0MoEError, match="control 'free'; there are held"):
        numbers().control("free")


def test_the_pages_are_those_that_the_tables_give() -> None:
    """Nobody has typed a number into them, and they were written again when a table changed."""
    for page, text in prose.render(ROOT / "docs" / "results").items():
        assert (ROOT / "docs" / page).read_text(encoding="utf-8") == text
        template = (ROOT / "benchmarks" / "reproduction" / f"{Path(page).name}.j2").read_text(
            encoding="utf-8"
        )
        assert text != template  # control: it has numbers to fill in

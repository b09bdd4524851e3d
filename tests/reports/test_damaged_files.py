"""Every file that the report reads, damaged in every way: one sentence with its name, or a report."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folder import build_run
from safetensors.numpy import save_file

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.recipe import Recipe
from megatron_l0moe.reports.collect import collect
from megatron_l0moe.reports.page import render, report
from megatron_l0moe.reports.plots import draw
from megatron_l0moe.reports.summary import build_summary

FILES = [
    "export/config.json",
    "curate/ccm.json",
    "curate/summary.json",
    "experts/001/metrics.jsonl",
    "moe/metrics.jsonl",
    "evaluate/perplexity.json",
    "evaluate/speed.json",
    "evaluate/router_load.json",
    "evaluate/parity.json",
    "moe/manifest.json",
]
MISSING = object()
PLACES = 16
"""Of each file that are edited."""
OTHERS = (None, "x", [], {}, float("nan"), 0, -1, True)


@pytest.fixture(scope="module")
def plots(shared_run: tuple[Recipe, Path]) -> dict[str, str]:
    return dict.fromkeys(draw(build_summary(collect(*shared_run))), "")


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every key, of lists the first element's."""
    if isinstance(value, dict | list):
        inner = list(value.items()) if isinstance(value, dict) else list(enumerate(value))[:1]
        for key, below in inner:
            yield (*place, key)
            yield from places(below, (*place, key))


def changed(value: Any, place: tuple[Any, ...], other: Any) -> Any:
    copy = json.loads(json.dumps(value))
    parent = copy
    for key in place[:-1]:
        parent = parent[key]
    if other is MISSING:
        del parent[place[-1]]
    else:
        parent[place[-1]] = other
    return copy


@pytest.mark.parametrize("name", FILES)
def test_any_key_missing_or_of_another_kind(made_up_run, plots, name) -> None:
    """Whatever is not refused with the file's name must come to a page."""
    recipe, run = made_up_run
    file, refused = run / name, 0
    whole = file.read_text()
    first, _, rest = whole.partition("\n") if name.endswith("jsonl") else (whole, "", "")
    value = json.loads(first)
    found = list(places(value))
    for i, place in enumerate(found[:: -(-len(found) // PLACES)]):
        for other in (MISSING, OTHERS[i % len(OTHERS)]):
            file.write_text(json.dumps(changed(value, place, other)) + "\n" + rest)
            try:
                render(build_summary(collect(recipe, run)), plots)
            except L0MoEError as error:
                assert name in str(error), (place, other)  # noqa: PT017 - both outcomes are right
                assert "\n" not in str(error)  # noqa: PT017
                refused += 1
    assert refused > 3
    file.write_text(whole)
    render(build_summary(collect(recipe, run)), plots)  # control


@pytest.mark.parametrize("name", [*FILES, "experts/000/expert.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "no UTF-8", "zeros", "NaN", "list"])
def test_bytes_that_are_no_such_file(made_up_run, name, damage) -> None:
    recipe, run = made_up_run
    file = run / name
    whole = file.read_bytes()
    file.write_bytes(
        {
            "cut": whole[: len(whole) // 2],
            "empty": b"",
            "no UTF-8": whole[:20] + b"\xff" + whole[21:],
            "zeros": bytes(len(whole)),
            "NaN": b'{"overall": NaN}',
            "list": b"[]",
        }[damage]
    )
    with pytest.raises(L0MoEError, match=name) as refused:
        collect(recipe, run)
    assert "\n" not in str(refused.value)


def test_a_damaged_config_of_the_dense_model(made_up_run) -> None:
    recipe, run = made_up_run
    file = Path(recipe.model.path) / "config.json"
    file.write_text(file.read_text().replace('"num_attention_heads": 4', '"num_attention_heads": 0'))
    with pytest.raises(L0MoEError, match=r"dense/config\.json has no fitting num_attention_heads"):
        report(recipe, run, run / "report")


def test_files_that_do_not_fit_each_other_are_one_sentence(made_up_run) -> None:
    """Each is a sound file, but one expert has layers that the others lack."""
    recipe, run = made_up_run
    save_file({"layers.2.units": np.arange(8)}, run / "experts" / "003" / "expert.safetensors")
    with pytest.raises(L0MoEError, match=r"do not fit each other .*find the one .*`l0moe verify"):
        report(recipe, run, run / "report")


NAMES = ["$_$", r"$\frac{$", "a$%$b", "$x^2$", "half \ud83d", "<b>&", "\x00\x1b", "%s {} \\"]


def test_source_domains_of_any_name(tmp_path) -> None:
    """matplotlib would read some as formulas, and half a surrogate pair cannot be written."""
    recipe, run = build_run(tmp_path)
    for file in (run / "evaluate").glob("*.json"):
        text = file.read_text()
        for old, new in zip(("code_c", "docs/sql", "novel"), NAMES, strict=False):
            text = text.replace(json.dumps(old), json.dumps(new))
        file.write_text(text)
    report(recipe, run, run / "report")
    page = (run / "report" / "report.html").read_text(encoding="utf-8")
    for name in NAMES[:2]:
        assert page.count(name) > 3  # in the table and in both plots, as it is
    shutil.rmtree(run)
    recipe, run = build_run(tmp_path)
    for file in (run / "evaluate").glob("*.json"):
        text = file.read_text()
        for old, new in zip(("code_c", "docs/sql", "novel"), NAMES[3:], strict=False):
            text = text.replace(json.dumps(old), json.dumps(new))
        file.write_text(text)
    report(recipe, run, run / "report")
    page = (run / "report" / "report.html").read_text(encoding="utf-8")
    assert "half \\ud83d" in page
    assert "$x^2$" in page

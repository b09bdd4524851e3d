"""The page: every number is the summary's, nothing is loaded from elsewhere, poor quality is said."""

import copy
import json
import re
from html.parser import HTMLParser

import pytest

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.recipe import Recipe
from megatron_l0moe.recipe.sections import BenchmarkSection
from megatron_l0moe.reports.collect import collect
from megatron_l0moe.reports.page import escape, lookup, render, report, show, summary_lines
from megatron_l0moe.reports.plots import draw, moe_losses, to_svg
from megatron_l0moe.reports.summary import build_summary


class Page(HTMLParser):
    """Collects the elements that name a path of the summary, and the text of table cells that name none."""

    def __init__(self, text):
        super().__init__()
        self.named, self.cells, self.stack = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag in ("td", "b"):
            self.stack.append([tag, dict(attributes), ""])

    def handle_data(self, data):
        if self.stack:
            self.stack[-1][2] += data

    def handle_endtag(self, tag):
        if self.stack and tag == self.stack[-1][0]:
            _, attributes, text = self.stack.pop()
            if "data-key" in attributes:
                self.named.append((attributes["data-key"], attributes["data-form"], text))
            elif tag == "td":
                self.cells.append(text)


@pytest.fixture(scope="module")
def summary(shared_run):
    return build_summary(collect(*shared_run))


@pytest.fixture(scope="module")
def plots(summary):
    return draw(summary)


@pytest.fixture(scope="module")
def page(summary, plots):
    return render(summary, plots)


def test_every_number_comes_from_the_summary(summary, page):
    found = Page(page)
    assert len(found.named) > 120
    for path, form, text in found.named:
        assert text == show(lookup(summary, path), form), path
    names = {*summary["corpus"]["domains"], *summary["provenance"]}
    loose = [cell for cell in found.cells if re.search(r"\d", cell) and cell not in names]
    words = {"decode, batch 1", "decode, batch 8"}
    assert [cell for cell in loose if cell not in words and not cell.startswith("L0-MoE, ")] == []


def test_control_another_summary_gives_other_numbers(summary, plots, page):
    other = copy.deepcopy(summary)
    other["perplexity"]["l0moe"]["overall"] = 77.77
    assert "77.77" in render(other, plots)
    assert "77.77" not in page


def test_benchmarks_stand_on_the_page_where_they_were_run(made_up_run):
    recipe, run = made_up_run
    wanted = BenchmarkSection(tasks=["gsm8k"], limit=4)
    evaluation = recipe.evaluation.model_copy(update={"benchmarks": wanted})
    recipe = recipe.model_copy(update={"evaluation": evaluation})
    with pytest.raises(L0MoEError, match=r"benchmarks.json is missing; run the evaluate stage first"):
        collect(recipe, run)
    row = {
        "task": "gsm8k",
        "metric": "exact_match",
        "filter": "strict-match",
        "headline": True,
        "documents": 4,
        "dense": {"value": 0.5, "stderr": 0.2887},
        "l0moe": {"value": 0.25, "stderr": 0.25},
        "ratio": {"value": 0.5, "stderr": None},
    }
    result = {
        "harness": {"name": "lm-evaluation-harness", "version": "0.4.13"},
        "backend": "hf",
        "limit": 4,
        "code_execution": {"allowed": False},
        "rows": [row | {"task": "a_part_of_it", "headline": False}, row],
    }
    (run / "evaluate" / "benchmarks.json").write_text(json.dumps(result))
    summary = build_summary(collect(recipe, run))
    page = render(summary, draw(summary))
    named = {path: text for path, _, text in Page(page).named}
    assert named["/benchmarks/rows/1/dense/value"] == "0.500"
    assert named["/benchmarks/rows/1/dense/stderr"] == "0.289"
    assert named["/benchmarks/rows/1/ratio/stderr"] == "-"
    assert named["/benchmarks/limit"] == "4"
    assert "a_part_of_it" not in page
    assert "Programs that the models wrote" not in page


def test_no_benchmarks_no_section(page):
    assert 'id="benchmarks"' not in page


def test_loads_nothing_from_anywhere(page):
    page = re.sub(r'href="data:image/png;base64,[^"]*"', "", page)  # the scales beside heat maps
    assert not re.search(r"https?:|//\w|@import|<script|<link|<iframe|src=", page)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    assert "secret-host" not in page


def test_ids_are_unique_and_every_reference_has_one(page):
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    used = re.findall(r'href="#([^"]*)"', page) + re.findall(r"url\(#([^)]*)\)", page)
    assert set(used) <= set(ids)


def test_says_that_the_quality_is_poor(summary, plots, page):
    assert "The quality is still poor" in page
    assert "better than dense on novel" in page
    good = copy.deepcopy(summary)
    good["perplexity"]["ratio"]["l0moe"]["overall"] = 1.01
    assert "The quality is still poor" not in render(good, plots)


def test_same_summary_same_page(summary, plots):
    assert draw(copy.deepcopy(summary)) == plots


def test_every_axis_has_a_label(page):
    for label in (
        "dense time / L0-MoE time (ratio)",
        "iteration, in training order",
        "retention (fraction of FFN units)",
        "IoU of kept units (0 to 1)",
        "share of assignments",
        "loss (nats per token)",
        "balance loss (eq. 3)",
    ):
        assert label in page


def test_optional_curves_may_be_missing(summary):
    without = copy.deepcopy(summary)
    del without["training"]["moe"]["balance_loss"]
    assert "balance loss (eq. 3)" not in to_svg(moe_losses(without), prefix="x")


def test_report_writes_both_files_from_one_summary(made_up_run):
    recipe, run = made_up_run
    result = report(recipe, run, run / "report")
    written = json.loads((run / "summary.json").read_text())
    assert (run / "report" / "report.html").read_text() == render(written, draw(written))
    assert result["summary"] == summary_lines(written)


def test_summary_lines(summary):
    lines = summary_lines(summary)
    assert len(lines) == 5
    assert "dense 12.00, L0-MoE 18.00 = 1.50 times dense (36.00 before MoE training)" in lines[0]
    assert "prefill 1.17x (bound 1.31), decode batch 1 1.04x (1.31), batch 8 1.02x (1.00)" in lines[1]
    assert "3.1e-06 on 64 positions, 1 router near-ties" in lines[3]
    assert "0.000085 % of the paper's 30 billion: quality is still poor" in lines[4]


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (134515008, "int", "134,515,008"),
        (21.699, "ppl", "21.70"),
        (3.1e-6, "sci", "3.1e-06"),
        (0.00123, "percent", "0.0012"),
        (12.3, "percent", "12"),
        (None, "ppl", "-"),
        (1234, "text", "1234"),
    ],
)
def test_show(value, form, text):
    assert show(value, form) == text


def test_pointer_with_slash_and_tilde():
    assert lookup({"a/b~c": [1, 2]}, f"/{escape('a/b~c')}/1") == 2


def test_experts_made_without_training(made_up_run):
    """No curves of trainings that there were not, no training tokens, and the method's own numbers."""
    recipe, run = made_up_run
    raw = recipe.model_dump()
    raw["expert_training"]["method"] = "obs"
    constructed = Recipe.model_validate(raw)
    for k in range(recipe.model.num_experts):
        folder = run / "experts" / f"{k:03d}"
        manifest = json.loads((folder / "manifest.json").read_text())
        layers = {"2": {"relative_error": 0.25}}
        manifest["numbers"] = {
            "calibration_tokens": 640,
            "calibration_loss": 2.0,
            "layers": layers,
            "seconds": 3.5,
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / "metrics.jsonl").unlink()
    summary = build_summary(collect(constructed, run))
    assert summary["tokens"]["expert"] == 0
    assert summary["construction"]["calibration_tokens"] == 640 * recipe.model.num_experts
    assert summary["construction"]["layers"][0] == layers
    assert summary["seconds"]["experts"] == [3.5] * recipe.model.num_experts
    plots = draw(summary)
    assert {"retention", "expert_losses"}.isdisjoint(plots)
    text = render(summary, plots)
    assert "Made without training, by the method" in text
    assert "learned L0 masks" not in text
    assert len(summary_lines(summary)) == 5
    with pytest.raises(L0MoEError, match=r"metrics\.jsonl is missing"):  # control: of method l0
        collect(recipe, run)

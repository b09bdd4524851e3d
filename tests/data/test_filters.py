"""Which documents are dropped, and the reason that is counted."""

from typing import Any

import pytest
from datatrove.data import Document

from megatron_l0moe.curate.corpus.catalog import DocumentFilter
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.sections import FilterSection, SignalRange

SIGNAL = "rps_doc_word_count"


def reason(text: str = "some text", filters: dict[str, Any] | None = None, **metadata: Any) -> str | None:
    doc = Document(text=text, id="a.jsonl:1", metadata={"language": "en", **metadata})
    rules = DocumentFilter(FilterSection(**(filters or {})))
    verdict = rules.filter(doc)
    found = rules.reason(doc)
    assert verdict == (True if found is None else (False, found))  # as datatrove's pipelines ask
    return found


@pytest.mark.parametrize("text", ["", " \n\t", "\u00a0\u3000"])
def test_empty_text(text: str) -> None:
    assert reason(text) == "empty text"


@pytest.mark.parametrize("text", ["a", "====", "\u00e9" * 1000])
def test_one_repeated_character(text: str) -> None:
    assert reason(text) == "one repeated character"
    assert reason(text + "b") is None


def test_length_and_language() -> None:
    assert reason("123456", {"min_chars": 7}) == "shorter than filters.min_chars"
    assert reason("1234567", {"min_chars": 7}) is None
    assert reason(filters={"languages": ["de", "fr"]}) == "language not in filters.languages"
    assert reason(filters={"languages": ["de", "en"]}) is None
    assert reason(filters={"languages": ["en"]}, language="") == "language not in filters.languages"


def test_listed_duplicates() -> None:
    assert reason(listed_duplicate=True) == "listed in the duplicates file"
    assert reason(filters={"drop_duplicates": False}, listed_duplicate=True) is None


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([[0, 9, 50]], None),
        ([[0, 9, 49.9]], f"{SIGNAL} below its minimum"),
        ([[0, 9, 100.5]], f"{SIGNAL} above its maximum"),
        ([[0, 9, None]], f"{SIGNAL} has no value"),
        ([[0, 9, float("nan")]], f"{SIGNAL} has no value"),
        ([[0, 9, 10**400]], f"{SIGNAL} above its maximum"),
        ([], f"{SIGNAL} has no value"),
    ],
)
def test_signals(spans: list[Any], expected: str | None) -> None:
    filters = {"quality_signals": {SIGNAL: SignalRange(min=50.0, max=100.0)}}
    assert reason(filters=filters, signals={SIGNAL: spans}) == expected
    assert reason(filters=filters, signals=None) == "no quality signals"
    assert reason(signals={SIGNAL: spans}) is None  # no filter, no drop


def test_signals_that_cannot_be_used() -> None:
    filters = {"quality_signals": {SIGNAL: SignalRange(min=1.0)}}
    with pytest.raises(
        L0MoEError, match=r"document a\.jsonl:1 has no signal 'rps_doc_word_count'; it has other"
    ):
        reason(filters=filters, signals={"other": []})
    with pytest.raises(L0MoEError, match=r"rates parts of document a\.jsonl:1"):
        reason(filters=filters, signals={SIGNAL: [[0, 4, 1.0], [4, 9, 0.0]]})

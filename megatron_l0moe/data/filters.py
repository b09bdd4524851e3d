"""Which documents are used: the recipe's `data.filters` as a datatrove filter, one reason for each dropped document."""

from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.sections import FilterSection


class DocumentFilter(BaseFilter):
    """Drops empty text, text of one repeated character, and what the settings ask for.

    Exact repetitions across the corpus are the catalog's part, since one document alone does not show them.
    """

    name = "L0-MoE document filter"

    def __init__(self, settings: FilterSection) -> None:
        super().__init__()
        self._settings = settings
        self._languages = None if settings.languages is None else frozenset(settings.languages)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Return True, or (False, reason)."""
        reason = self.reason(doc)
        return (False, reason) if reason else True

    def reason(self, doc: Document) -> str | None:
        """Return why a document is dropped, or None.

        Raises:
            L0MoEError: a quality signal of the recipe is rated by line, not by document, or does not exist.
        """
        text = doc.text
        if not text.strip():
            return "empty text"
        if not text.strip(text[0]):
            return "one repeated character"
        if len(text) < self._settings.min_chars:
            return "shorter than filters.min_chars"
        if self._languages is not None and doc.metadata["language"] not in self._languages:
            return "language not in filters.languages"
        if self._settings.drop_duplicates and doc.metadata.get("listed_duplicate"):
            return "listed in the duplicates file"
        return self._signal_reason(doc) if self._settings.quality_signals else None

    def _signal_reason(self, doc: Document) -> str | None:
        signals = doc.metadata.get("signals")
        if signals is None:
            return "no quality signals"
        for name, limits in self._settings.quality_signals.items():
            value = _value_of(name, signals, doc.id)
            if value is None:
                return f"{name} has no value"
            if limits.min is not None and value < limits.min:
                return f"{name} below its minimum"
            if limits.max is not None and value > limits.max:
                return f"{name} above its maximum"
        return None


def _value_of(name: str, signals: dict[str, Any], document: str) -> float | None:
    """Return the value of a signal that rates a whole document: one span [start, end, value]."""
    spans = signals.get(name)
    if spans is None:
        raise L0MoEError(
            f"data.filters.quality_signals: document {document} has no signal {name!r}; it has "
            f"{', '.join(sorted(signals)) or 'none'}."
        )
    match spans:
        case [[_, _, int() | float() as value]]:
            return None if value != value else value  # NaN is within no range
        case [] | [[_, _, None]]:
            return None
    raise L0MoEError(
        f"data.filters.quality_signals: {name} rates parts of document {document}, not the whole; choose a signal with "
        "one value for a document, such as rps_doc_word_count."
    )

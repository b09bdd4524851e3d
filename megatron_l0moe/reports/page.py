"""The HTML page: one self-contained file, rendered from the summary and from nothing else."""

import math
from typing import Any

import jinja2

from megatron_l0moe.reports.collect import Json
from megatron_l0moe.reports.plots import MODES

TEMPLATE = "page.html.j2"
SETTINGS = (
    ("/recipe/model/path", "dense model"),
    ("/recipe/model/dense_layers", "bottom layers that stay dense"),
    ("/recipe/model/num_experts", "experts (K)"),
    ("/recipe/model/expert_ffn", "units of each expert"),
    ("/recipe/model/top_k", "experts per token"),
    ("/recipe/data/corpus", "corpus"),
    ("/recipe/data/embedding_model", "embedding model"),
    ("/recipe/data/iterations", "iterations of sampling (Q)"),
    ("/recipe/data/seq_length", "sequence length"),
    ("/recipe/expert_training/learning_rate", "learning rate, expert runs"),
    ("/recipe/expert_training/mask_learning_rate", "learning rate, masks"),
    ("/recipe/moe_training/learning_rate", "learning rate, MoE training"),
    ("/recipe/moe_training/router_learning_rate", "learning rate, routers"),
    ("/recipe/seed", "seed"),
)
FORMS = {
    "int": ",.0f",
    "ppl": ",.2f",
    "ratio": ".2f",
    "loss": ".3f",
    "one": ",.1f",
    "sci": ".1e",
    "score": ".3f",
}
WORSE = 1.05
"""From this perplexity ratio on the page says in plain words that the quality is poor."""


def render(summary: Json, plots: dict[str, str]) -> str:
    """Return the page of a summary; `plots` are those of `plots.draw`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_l0moe.reports", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    ratio = summary["perplexity"]["ratio"]["l0moe"]
    table = summary["corpus"]["table"]
    largest = [max(max(row), 1) for row in table]
    return environment.get_template(TEMPLATE).render(
        s=summary,
        plots=plots,
        modes=MODES,
        settings=SETTINGS,
        show=lambda path, form: show(lookup(summary, path), form),
        escape=escape,
        shade=lambda row, column: f"{0.75 * table[row][column] / largest[row]:.2f}",
        worse=ratio["overall"] > WORSE,
        better_domains=[domain for domain, value in ratio["per_domain"].items() if value < 1.0],
        curves=sum("layers" in run["retention"] for run in summary["training"]["experts"]),
    )


def escape(key: str) -> str:
    """Escape a key for a path (RFC 6901)."""
    return key.replace("~", "~0").replace("/", "~1")


def lookup(summary: Json, path: str) -> Any:
    """Return the value at a JSON pointer (RFC 6901)."""
    value: Any = summary
    for part in path.removeprefix("/").split("/"):
        key = part.replace("~1", "/").replace("~0", "~")
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def show(value: Any, form: str) -> str:
    """Write a value for people; `form` is text, percent or one of FORMS."""
    if value is None:
        return "-"
    if form == "text":
        return str(value)
    if form == "percent":
        return _two_digits(value)
    return format(value, FORMS[form])


def _two_digits(value: float) -> str:
    """Write a positive number with two significant digits and no exponent."""
    return f"{value:.{max(1 - math.floor(math.log10(value)), 0)}f}" if value > 0 else "0"

"""The report stage: summary.json, then one self-contained HTML page, rendered from it and from nothing else."""

import logging
import math
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import UndefinedError

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.recipe import SECTIONS_OF_METHODS, TITLES, ModelMethod, Recipe, only_l0moe
from megatron_l0moe.reports.collect import Json, collect
from megatron_l0moe.reports.plots import MODES, draw
from megatron_l0moe.reports.summary import build_summary
from megatron_l0moe.runs.stage_folder import write_json, write_text

logger = logging.getLogger(__name__)

TEMPLATE = "page.html.j2"
SETTINGS = (  # those that a recipe of the method may hold are shown
    ("/recipe/model/path", "dense model"),
    ("/recipe/model/dense_layers", "bottom layers that stay dense"),
    ("/recipe/model/num_experts", "experts (K)"),
    ("/recipe/model/expert_ffn", "units of each expert"),
    ("/recipe/model/top_k", "experts per token"),
    ("/recipe/dsmoe/blocks", "blocks of a layer"),
    ("/recipe/dsmoe/threshold", "threshold of the gates"),
    ("/recipe/dsmoe/sparsity_coefficient", "weight of the sparsity loss"),
    ("/recipe/mom/masks", "masks of a layer"),
    ("/recipe/mom/top_k", "masks per token"),
    ("/recipe/mom/target", "fraction of the FFN that a token uses"),
    ("/recipe/mom/balance_coefficient", "weight of the balance loss"),
    ("/recipe/mom/mask_learning_rate", "learning rate, masks"),
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
OTHER_LABELS = {
    "experts (K)": "clusters (K)",
    "learning rate, MoE training": "learning rate",
    "learning rate, routers": "learning rate, gates or routers",
}
"""The labels of settings that mean something else to a method without experts."""
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
"""The perplexity ratio from which on the page says in plain words that the quality is poor."""


def render(summary: Json, plots: dict[str, str]) -> str:
    """Return the page of a summary; `plots` are those of `plots.draw`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_l0moe.reports", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    method: ModelMethod = summary["recipe"]["method"]
    ratio = summary["perplexity"]["ratio"][method]
    table = summary["corpus"]["table"]
    largest = [max(max(row), 1) for row in table]
    return environment.get_template(TEMPLATE).render(
        s=summary,
        plots=plots,
        modes=MODES,
        method=method,
        title=TITLES[method],
        training="MoE training" if method == "l0moe" else f"{TITLES[method]} training",
        settings=[
            (path, label if method == "l0moe" else OTHER_LABELS.get(label, label))
            for path, label in SETTINGS
            if belongs(path, method)
        ],
        show=lambda path, form: show(lookup(summary, path), form),
        escape=escape,
        shade=lambda row, column: f"{0.75 * table[row][column] / largest[row]:.2f}",
        worse=ratio["overall"] > WORSE,
        better_domains=[domain for domain, value in ratio["per_domain"].items() if value < 1.0],
        curves=sum("layers" in run["retention"] for run in summary["training"]["experts"]),
    )


def belongs(path: str, method: ModelMethod) -> bool:
    """Say whether the setting at a path of the summary means something to the method."""
    section, key = path.removeprefix("/recipe/").partition("/")[::2]
    if section in SECTIONS_OF_METHODS:
        return section == method
    return method == "l0moe" or (section, key) not in only_l0moe()


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


def report(recipe: Recipe, run: Path, out: Path) -> dict[str, object]:
    """Write `run`/summary.json and `out`/report.html.

    Returns:
        The five summary lines, for the manifest.

    Raises:
        L0MoEError: something is missing or damaged; the message names the file and the stage to run.
    """
    files = collect(recipe, run)
    try:
        summary = _printable(build_summary(files))
        page = render(summary, draw(summary))
    except L0MoEError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, UndefinedError) as error:
        raise L0MoEError(
            f"The files of {run} do not fit each other ({type(error).__name__}: {error}); find the one that was "
            f"changed with `l0moe verify {run}`, and make its stage anew."
        ) from error
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "report.html", page)
    write_json(run / "summary.json", summary)
    logger.info("report: %s (%d kB)", out / "report.html", len(page) // 1000)
    return {"summary": summary_lines(summary)}


def summary_lines(summary: Json) -> list[str]:
    """Return the five lines that a run ends with."""
    method: ModelMethod = summary["recipe"]["method"]
    title, is_l0moe = TITLES[method], method == "l0moe"
    ppl, ratio = summary["perplexity"], summary["perplexity"]["ratio"][method]["overall"]
    speed, bounds = summary["speed"], summary["speed"]["bounds"]
    parameters, tokens, parity = summary["parameters"], summary["tokens"], summary["parity"]
    values = {name: show(table["overall"], "ppl") for name, table in ppl.items() if name != "ratio"}
    before = f" ({values['l0moe_untrained']} before MoE training)" if is_l0moe else ""
    trained = f"{tokens['moe']:,} tokens"
    if is_l0moe:
        share = show(tokens["percent_of_paper"], "percent")
        trained = (
            f"{tokens['expert']:,} tokens for the experts + {tokens['moe']:,} for the MoE = {share} % of the paper's "
            "30 billion"
        )
    verdict = ": quality is still poor at this budget" if ratio > WORSE else ""
    return [
        f"Perplexity on held-out text: dense {values['dense']}, {title} {values[method]} = {ratio:.2f} times dense"
        f"{before}",
        f"Speed against dense: prefill {speed['prefill_ratio']:.2f}x (bound {bounds['prefill']:.2f}), "
        f"decode batch 1 {speed['decode_b1_ratio']:.2f}x ({bounds['decode_b1']:.2f}), "
        f"batch 8 {speed['decode_b8_ratio']:.2f}x ({bounds['decode_b8']:.2f})",
        f"Parameters: dense {_millions(parameters['dense'])}; {title} {_millions(parameters['total'])}, of which "
        f"{_millions(parameters['active'])} active for each token",
        f"Parity of Megatron and the exported model: logits within {show(parity['megatron_vs_hf_max_abs'], 'sci')} "
        f"on {parity['positions']} positions, {parity['near_tie_count']} "
        f"{'router' if 'router' in summary else 'gate'} near-ties",
        f"Training: {trained}{verdict}",
    ]


def _printable(value: Any) -> Any:
    """Return JSON whose texts can be written as UTF-8: half of a surrogate pair becomes its escape."""
    if isinstance(value, dict):
        return {_printable(key): _printable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_printable(inner) for inner in value]
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"

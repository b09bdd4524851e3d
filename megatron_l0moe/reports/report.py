"""The report stage: summary.json, then report.html from it."""

import logging
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.recipe import TITLES, ModelMethod, Recipe
from megatron_l0moe.reports.collect import Json, collect
from megatron_l0moe.reports.page import WORSE, render, show
from megatron_l0moe.reports.plots import draw
from megatron_l0moe.reports.summary import build_summary
from megatron_l0moe.runs.stage_folder import write_json, write_text

logger = logging.getLogger(__name__)


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

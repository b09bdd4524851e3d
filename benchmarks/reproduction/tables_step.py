"""Step `tables`: the page, its numbers as JSON and its plots out of the result folders; nothing is typed by hand."""

from pathlib import Path

from figures import write_figures
from page import largest_share, markdown, not_run, not_timed
from results import Result, read_base, read_controls, read_results
from runs_table import RunsTable
from settings import Place

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.reports.collect import Json
from megatron_l0moe.reports.summary import router_numbers
from megatron_l0moe.runs.stage_folder import write_json, write_text


def write_tables(place: Place, table: RunsTable, out: Path) -> None:
    """Write tables and plots of what has been measured so far; rows without a result are named as not run.

    Raises:
        L0MoEError: the base has not been measured.
    """
    base = read_base(place)
    if base is None:
        raise L0MoEError(f"{place.root} has no results; run the steps base and methods first.")
    results = read_results(place, table)
    out.mkdir(parents=True, exist_ok=True)
    page = place.settings.page
    controls = read_controls(place)
    figures = write_figures(page, base, results, controls, table, out)
    text = markdown(place.settings.title, base, results, table, figures, controls)
    write_text(out / f"{page}.md", text)
    missing = {"not_run": not_run(table, results), "not_timed": not_timed(table, results)}
    kept = [
        {key: value for key, value in one.items() if key not in ("target", "retention")} for one in controls
    ]
    records = [record(result) for result in (base, *results)]
    write_json(out / f"{page}.json", {"results": records, "controls": kept, **missing})


def record(result: Result) -> Json:
    """Return what reproduction.json keeps of a model: every number of the page, without curves and single layers."""
    values, training, speed = dict(result.values), result.training, result.speed
    values["perplexity"] = {
        key: value for key, value in values["perplexity"].items() if "cluster" not in key
    }  # the held-out text's cluster is its domain
    if load := values.pop("router_load", None):
        values["router"] = {
            "mean_load": router_numbers(load)["mean_load"],
            "mean_largest_share": largest_share(load),
        }
    if training:
        values["phases"] = [
            {key: value for key, value in one.items() if key != "curve"} for one in training["phases"]
        ]
        values |= {key: training[key] for key in ("num_experts", "iterations", "overlap") if key in training}
    if speed:
        values["speed"] = {mode: _plain(detail) for mode, detail in speed["details"].items()}
        values["speed_machine"] = speed["hardware"]
    manifest = {key: result.manifest[key] for key in ("commit", "finished")}
    return {"row": result.row, "seed": result.seed, **values, **manifest}


def _plain(detail: Json) -> Json:
    return {**detail, "ratio": {key: value for key, value in detail["ratio"].items() if key != "pairs"}}

"""Step `speed`: prefill and decode of what was made, each timed in pairs with the dense base, in one process."""

import json
import logging
from pathlib import Path

from results import HELDOUT, SPEED, folder, save
from runs_table import Case, RunsTable, chain_run
from settings import Place

from megatron_l0moe.methods.method import method_of
from megatron_l0moe.recipe.recipe import section_hash
from megatron_l0moe.reports.collect import Json
from megatron_l0moe.runs.stage_folder import read_manifest

logger = logging.getLogger(__name__)

TIMED_TABLES = ("comparison", "sweeps")
"""The rows of the other tables have shapes that stand here already."""


def time_rows(place: Place, table: RunsTable) -> None:
    """Write results/speed/NAME for the first seed of every timed row; a row without a model is named and left out."""
    heldout, base = place.root / "tokens", place.root / "base"
    settings = place.settings.speed
    for case in table.first_cases():
        if case.settings.table not in TIMED_TABLES:
            continue
        if not read_manifest(folder(place, case.name, HELDOUT)):
            logger.warning("speed: %s is not there yet", case.name)
            continue
        run = chain_run(place, table, case)
        made = run.stage_folder("export") if case.settings.kind == "l0moe" else run.folder / "dense"
        model = made if case.settings.kind == "l0moe" else made / "hf"

        def work(model: Path = model, case: Case = case) -> Json:
            return _time(place, model, case)

        save(place, case.name, SPEED, section_hash(settings), (made, base, heldout), work)


def _time(place: Place, model: Path, case: Case) -> Json:
    from megatron_l0moe.evaluation.evaluate import checkpoint_counts
    from megatron_l0moe.evaluation.models import load_model
    from megatron_l0moe.evaluation.timing import measure_speed
    from megatron_l0moe.index.heldout_file import read_heldout

    settings, method = place.settings.speed, case.settings.method
    heldout = json.loads((folder(place, case.name, HELDOUT) / HELDOUT).read_text(encoding="utf-8"))
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    counts = method_of(method).exported_counts(config, heldout.get("open_blocks"))
    return measure_speed(
        load_model(place.base_model),
        load_model(model),
        read_heldout(place.root / "tokens" / "heldout.jsonl"),
        counts=(checkpoint_counts(place.base_model), counts),
        prefill_tokens=settings.prefill_tokens,
        decode_tokens=settings.decode_tokens,
        repeats=settings.repeats,
    )

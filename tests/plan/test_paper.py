"""Table 5: our counts against the real models' numel(), the printed columns, and the page that shows both."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_l0moe.checkpoints.families import MoEShape
from megatron_l0moe.conversion import targets
from megatron_l0moe.conversion.moe_layouts import LAYOUTS
from megatron_l0moe.plan.plan import (
    FITTING_DENSE_LAYERS,
    TABLE5,
    Table5Row,
    agrees,
    disagreement,
    full_active,
    paper_total,
)
from megatron_l0moe.sizes.parameters import count_parameters, speed_bounds

PAGE = Path(__file__).parents[2] / "docs" / "plan.md"
CONSTANTS = ("e_score_correction_bias", "shared_expert_gate")
ROWS = {row.name: row for row in TABLE5}


def numel(config: dict[str, object], **changes: object) -> int:
    """Count the weights of a model of transformers, made without memory."""
    values = {key: value for key, value in (config | changes).items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(str(config["model_type"]), **values))
    parameters = dict(model.named_parameters())
    return sum(p.numel() for name, p in parameters.items() if not any(part in name for part in CONSTANTS))


def exported(row: Table5Row) -> dict[str, object]:
    """Return the config.json that the export stage writes for transformers."""
    base = row.architecture()
    shape = MoEShape(
        dense_layers=row.dense_layers, num_experts=64, expert_ffn=row.expert_ffn, top_k=2, renormalised=True
    )
    form = targets.plan("all", targets.Model.of(base))[0].form
    return LAYOUTS[form].hf_config(base, shape, "bfloat16", ("transformers",))


@pytest.mark.parametrize("name", ROWS)
def test_counts_to_the_last_digit(name: str) -> None:
    """The dense models and the exported L0-MoEs of 22 to 24 billion weights."""
    row = ROWS[name]
    assert row.dense().counts.total == numel(row.config)
    assert row.moe().counts.total == numel(exported(row)) == count_parameters(exported(row)).total
    assert row.moe(row.dense_layers + 1).counts.total != numel(exported(row))  # control


def test_the_dense_column_leaves_one_embedding_out() -> None:
    for row in TABLE5:
        assert agrees(paper_total(row.dense().counts) / 1e9, row.dense_billions)
        assert not agrees(row.dense().counts.total / 1e9, row.dense_billions)


def test_only_qwen2s_columns_follow_from_the_text() -> None:
    assert [row.name for row in TABLE5 if disagreement(row) is None] == ["Qwen2-7B"]
    for row in TABLE5:
        fitting = row.moe(4).counts
        assert agrees(paper_total(fitting) / 1e9, row.total_billions)
        assert agrees(fitting.active / 1e9, row.active_billions)


def test_by_hand() -> None:
    """Llama-3-8B with 8 dense layers, without the input embedding."""
    attention, norms = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024), 65 * 4096
    shared = 128256 * 4096 + attention + norms + 8 * 3 * 4096 * 14336 + 24 * 64 * 4096
    counts = ROWS["Llama-3-8B"].moe().counts
    assert paper_total(counts) == shared + 24 * 64 * 3 * 4096 * 1024 == 22_610_710_528
    assert counts.active == shared + 24 * 2 * 3 * 4096 * 1024


def page_rows() -> list[str]:
    """Return the rows of the table in docs/plan.md."""
    rows = []
    for row in TABLE5:
        dense, stated, fitting = (
            row.dense().counts,
            row.moe().counts,
            row.moe(FITTING_DENSE_LAYERS).counts,
        )
        cells = [
            row.name,
            f"{row.dense_billions:g}",
            f"{billions(dense.total)} / {billions(paper_total(dense))}",
            f"{row.total_billions:g} / {row.active_billions:g}",
            f"{billions(stated.total)} / {billions(full_active(stated))}",
            f"{billions(paper_total(stated))} / {billions(stated.active)}",
            f"{billions(paper_total(fitting))} / {billions(fitting.active)}",
            f"{row.speedup:.1f}",
            f"{speed_bounds(dense, stated).prefill:.2f} / {speed_bounds(dense, fitting).prefill:.2f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def billions(count: int) -> str:
    return f"{count / 1e9:.2f}"


def test_the_page_holds_the_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [row for row in page_rows() if row not in text] == []
    for row in TABLE5:
        if sentence := disagreement(row):
            assert sentence in " ".join(text.split())

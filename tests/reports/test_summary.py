"""The summary's numbers against hand-worked ones, what is compared between runs, and what a missing file says."""

import copy
import json

import numpy as np
import pytest
from run_folder import DENSE_LAYERS, FFN, LAYERS, STAGES, STEPS, WIDTH, K

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.reports.collect import collect
from megatron_l0moe.reports.summary import (
    build_summary,
    chance_iou,
    deterministic_part,
    mean_pairwise_iou,
    thin,
)


@pytest.fixture(scope="module")
def summary(shared_run):
    return build_summary(collect(*shared_run))


def test_holds_the_promised_numbers(summary):
    assert summary["perplexity"]["dense"]["overall"] == 12.0
    assert summary["perplexity"]["l0moe_untrained"]["per_domain"]["code_c"] == 30.0
    assert summary["perplexity"]["ratio"]["l0moe"]["overall"] == 1.5
    assert summary["perplexity"]["ratio"]["l0moe"]["per_domain"]["novel"] == 9.0 / 12.0
    assert summary["speed"]["prefill_ratio"] == 1.17
    assert summary["speed"]["decode_b8_ratio"] == 1.02
    assert summary["parity"]["megatron_vs_hf_max_abs"] == 3.1e-6
    assert summary["parity"]["near_tie_count"] == len(summary["parity"]["near_ties"]) == 1
    assert summary["tokens"]["expert"] == K * STEPS * 128
    assert summary["tokens"]["moe"] == STEPS * 128
    assert summary["tokens"]["percent_of_paper"] == pytest.approx(100 * 25_600 / 30e9)
    assert summary["experts"]["width_per_layer"] == {str(i): WIDTH for i in range(DENSE_LAYERS, LAYERS)}
    assert summary["seconds"]["experts"] == [0.5 * STEPS] * K


def test_parameters_are_those_of_the_shapes(summary):
    # H 16, V 256, attention 2*16*16 + 2*16*8 = 768, norms 13*16 = 208
    body = 256 * 16 + LAYERS * 768 + 208
    dense = body + LAYERS * 3 * 16 * FFN
    total = body + 2 * 3 * 16 * FFN + 4 * (K * 3 * 16 * WIDTH + K * 16)
    assert summary["parameters"]["dense"] == dense
    assert summary["parameters"]["total"] == total
    assert summary["parameters"]["active"] == total - 4 * 2 * 3 * 16 * WIDTH  # tied: LM head = embedding


def test_overlap_by_hand(summary):
    sets = [np.array(units) for units in ([0, 1, 2, 3], [2, 3, 4, 5], [6, 7, 8, 9])]
    assert mean_pairwise_iou(sets) == pytest.approx((2 / 6 + 0 + 0) / 3)
    # Of the 6 pairs 4 are neighbours that share half.
    assert summary["experts"]["iou"]["2"] == pytest.approx(4 * (4 / 12) / 6)
    assert chance_iou(384, 1536) == pytest.approx(0.25 / 1.75)


def test_chance_level_is_what_random_choices_give():
    rng = np.random.default_rng(0)
    sets = [np.sort(rng.choice(1536, 384, replace=False)) for _ in range(12)]
    assert mean_pairwise_iou(sets) == pytest.approx(chance_iou(384, 1536), abs=0.005)


def test_router_numbers(summary):
    assert summary["router"]["mean_load"]["docs/sql"] == pytest.approx([0.3, 0.2, 0.1, 0.4])
    assert summary["router"]["largest_share"]["3"]["novel"] == 0.4
    assert summary["router"]["uniform_share"] == 0.25


def test_training_order_of_the_iterations(summary):
    distances = [row["d_ds"] for row in summary["ccm"]["in_training_order"]]
    assert distances == sorted(distances)
    numbers = [row["iteration"] for row in summary["ccm"]["in_training_order"]]
    assert numbers == summary["ccm"]["order"]


def test_terms_of_the_confusion_are_means_of_their_own_set(summary):
    ccm = summary["ccm"]
    for row in ccm["in_training_order"]:
        for term in ("f1", "f2", "f3"):
            values = ccm[term][row["iteration"] - 1]
            assert row[f"mean_{term}"] == pytest.approx(sum(values) / len(values))
    assert len({row["mean_f1"] for row in ccm["in_training_order"]}) > 1


def test_first_frozen_step(summary):
    assert summary["training"]["experts"][0]["frozen_from"] == 37


@pytest.mark.parametrize(("count", "limit"), [(1, 5), (5, 5), (6, 5), (1000, 120)])
def test_thin_keeps_the_ends(count, limit):
    kept = thin(count, limit)
    assert kept[0] == 0
    assert kept[-1] == count - 1
    assert len(kept) == min(count, limit) == len(set(kept))


def test_deterministic_part_ignores_time_and_place_only(summary):
    other = copy.deepcopy(summary)
    other["speed"]["prefill_ratio"] = 9.9
    other["seconds"]["moe"] = 1.0
    other["provenance"]["moe"]["finished"] = "later"
    assert deterministic_part(other) == deterministic_part(summary)
    assert "perplexity" in deterministic_part(summary)
    other["training"]["moe"]["lm_loss"][3] += 1e-9  # control
    assert deterministic_part(other) != deterministic_part(summary)


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("export/config.json", "export"),
        ("curate/ccm.json", "curate"),
        ("experts/002/metrics.jsonl", "experts"),
        ("experts/001/expert.safetensors", "experts"),
        ("moe/metrics.jsonl", "moe"),
        ("evaluate/parity.json", "evaluate"),
        *((f"{folder}/manifest.json", folder.split("/")[0]) for folder in STAGES),
    ],
)
def test_missing_file_names_the_stage(made_up_run, file, stage):
    recipe, run = made_up_run
    (run / file).unlink()
    with pytest.raises(L0MoEError, match=rf"{file} is missing; run the {stage} stage first"):
        collect(recipe, run)


def test_broken_and_empty_files_are_named(made_up_run):
    recipe, run = made_up_run
    metrics = run / "moe" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"iteration": 41, "lm')
    with pytest.raises(L0MoEError, match=r"metrics.jsonl:41 is not valid JSON"):
        collect(recipe, run)
    metrics.write_text("")
    with pytest.raises(L0MoEError, match=r"metrics.jsonl is empty"):
        collect(recipe, run)


def test_expert_of_another_width_stops(made_up_run):
    recipe, run = made_up_run
    wider = recipe.model_copy(update={"model": recipe.model.model_copy(update={"expert_ffn": 9})})
    with pytest.raises(L0MoEError, match=r"widths \[8\], the recipe says model.expert_ffn = 9"):
        build_summary(collect(wider, run))


def test_summary_is_plain_json(summary):
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary

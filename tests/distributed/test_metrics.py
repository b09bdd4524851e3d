"""The records of a step are the same in every layout, in metrics.jsonl and in TensorBoard: real runs of two stages.

Toy runs of four steps, which the layouts go on with from the checkpoint of step 2. The load by domain is recorded in
the steps 1, 2 and 4.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import resume_world as toy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_l0moe.training import metrics

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

PROGRAM = Path(__file__).with_name("metric_runs.py")
MOE, EXPERT = toy.Case("moe", "fp32", "plain"), toy.Case("expert", "fp32", "plain")
START, STEPS, DUE = 2, 4, [1, 2, 4]
SHORT = [
    *("--train-iters", str(STEPS), "--lr-wsd-decay-iters", "1", "--l0-domain-load-interval", "2"),
]
# one dense layer, so that the first of two stages has a router too
THREE_ROUTERS = ["--l0-dense-layers", "1", "--moe-layer-freq", "([0]*1+[1]*3)"]
RECOMPUTE = [
    "--recompute-granularity",
    "full",
    "--recompute-method",
    "uniform",
    "--recompute-num-layers",
    "1",
]
VIRTUAL = ["--num-virtual-stages-per-pipeline-rank", "2"]
LAYOUTS = {
    "dp2": toy.layout(),
    "tp2": toy.layout(tp=2),
    "ep2": toy.layout(ep=2),
    "pp2_recompute": [*toy.layout(pp=2), *RECOMPUTE],
    "pp2_vpp2": [*toy.layout(pp=2), *VIRTUAL],
}
FAULTS = {"domains_stay": "pp2_recompute", "not_summed": "dp2"}
# Sums in another order, and an update of the weights after it; seen: 4e-7. domain_load has five digits.
ATOL = 2e-5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, in two launches."""
    root = tmp_path_factory.mktemp("metrics")
    index = toy.write_indexes(root / "index")

    def run(case: toy.Case, name: str, layout: list[str], broken: str = "") -> dict[str, Any]:
        more = THREE_ROUTERS if case is MOE else []
        board = ["--tensorboard-dir", str(root / name / "board"), "--tensorboard-log-interval", "2"]
        if not name.endswith("_one"):
            toy.stopped(root / f"{case.stage}_one", START, root / name)
        planned = toy.run(case, root / name, index, layout, *SHORT, *more, *board, broken=broken)
        if not name.endswith("_one"):  # a layout saves nothing, which would cost more than its steps
            place = planned["argv"].index("--save")
            del planned["argv"][place : place + 2]
        return planned

    toy.launch(
        1,
        [run(MOE, "moe_one", toy.layout()), run(EXPERT, "expert_one", toy.layout())],
        root / "one.log",
        PROGRAM,
    )
    plan = [run(MOE, f"moe_{name}", layout) for name, layout in LAYOUTS.items()]
    plan += [run(MOE, f"moe_{fault}", LAYOUTS[name], fault) for fault, name in FAULTS.items()]
    plan += [
        run(EXPERT, f"expert_{name}", toy.layout(**sizes))
        for name, sizes in (("tp2", {"tp": 2}), ("pp2", {"pp": 2}))
    ]
    toy.launch(2, plan, root / "two.log", PROGRAM)
    return root


def records(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["iteration"] for row in rows] == list(range(1, STEPS + 1))
    return rows


def difference(one: Any, two: Any) -> float:
    """Return the largest difference of two records, but for the time that they took."""
    if isinstance(one, dict):
        timed = {"seconds", "tokens_per_second", "mfu"}
        assert one.keys() == two.keys()
        return max((difference(one[key], two[key]) for key in one.keys() - timed), default=0.0)
    if isinstance(one, list):
        assert len(one) == len(two)
        return max((difference(a, b) for a, b in zip(one, two, strict=True)), default=0.0)
    return 0.0 if one == two else abs(float(one) - float(two))


@pytest.mark.parametrize("name", LAYOUTS)
def test_moe_in_a_layout(root: Path, name: str) -> None:
    assert difference(records(root / f"moe_{name}"), records(root / "moe_one")) <= ATOL


@pytest.mark.parametrize("name", ["tp2", "pp2"])
def test_expert_in_a_layout(root: Path, name: str) -> None:
    assert difference(records(root / f"expert_{name}"), records(root / "expert_one")) <= ATOL


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(root: Path, fault: str) -> None:
    assert difference(records(root / f"moe_{fault}"), records(root / "moe_one")) > 100 * ATOL


def test_one_process_by_hand(root: Path) -> None:
    rows = records(root / "moe_one")
    assert [row["iteration"] for row in rows if "domain_load" in row] == DUE
    for row in rows:
        assert list(row["load"]) == ["1", "2", "3"]
        assert row["z_loss"] > 0
        assert row["tokens_per_second"] == pytest.approx(toy.BATCH * toy.SEQUENCE / row["seconds"], rel=1e-2)
        assert row["mfu"] is None
        if "domain_load" not in row:
            continue
        by_domain = np.array(row["domain_load"])
        assert by_domain.shape == (toy.EXPERTS, toy.EXPERTS)
        # every domain gives as many tokens, so the load is the mean of the domains' loads
        load = np.mean([row["load"][layer] for layer in row["load"]], axis=0)
        np.testing.assert_allclose(by_domain.mean(axis=0), load, atol=1e-5)
        own = np.mean(list(row["own_expert"].values()))
        assert own == pytest.approx(np.trace(by_domain) / toy.EXPERTS, abs=1e-5)
    first = np.array(rows[1]["domain_load"])
    assert np.abs(first - first.mean(axis=0)).max() > 0.05  # the domains do differ: a mix-up would show


@pytest.mark.parametrize("name", ["moe_one", "moe_pp2_vpp2", "moe_dp2", "expert_tp2"])
def test_tensorboard_holds_the_same(root: Path, name: str) -> None:
    """Written by the last rank, where metrics.jsonl is written by the first of the last stage."""
    board = EventAccumulator(str(root / name / "board"))
    board.Reload()
    tags = {tag for tag in board.Tags()["scalars"] if tag.startswith("l0moe/")}
    steps = [step for step in (2, 4) if step > START or name.endswith("_one")]  # --tensorboard-log-interval 2
    rows = {row["iteration"]: metrics.scalars(row) for row in records(root / name)}
    assert tags == rows[4].keys()
    assert {"moe": "l0moe/own_expert/domain_3", "expert": "l0moe/retention/mean"}[name.split("_")[0]] in tags
    for tag in tags - {"l0moe/tokens_per_second"}:
        events = board.Scalars(tag)
        assert [event.step for event in events] == steps
        assert [event.value for event in events] == pytest.approx(
            [rows[step][tag] for step in steps], abs=ATOL
        )

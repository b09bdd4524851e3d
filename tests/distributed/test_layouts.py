"""One step in every parallel layout equals one process: losses, all gradients, all buffers, on real gloo processes.

One launch for each number of processes does all layouts of that number; the tests read what it wrote. Beside the
layouts run faults on purpose, which must show. docs/parallel.md holds the result as a table, which is checked here;
after a wanted change: L0MOE_UPDATE_GOLDEN=1 pytest FILE.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distributed import layouts
from distributed.layouts import CASES, FAULTS, LAYOUTS, TOLERANCE, Run
from processes import torchrun

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

PROGRAM = Path(__file__).with_name("layout_steps.py")
TESTS = PROGRAM.parent.parent
PAGE = TESTS.parent / "docs" / "parallel.md"
START, END = "<!-- written by tests/distributed/test_layouts.py -->", "<!-- end of the tables -->"
NOTICEABLE = 1e-3  # a gradient this large is a thousand times the tolerance

Runs = dict[tuple[str, str, str], Run]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    for processes in (1, 2, 4):
        torchrun(processes, PROGRAM, folder, log=folder / f"{processes}.log")
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> Runs:
    lines = [
        line for file in folder.glob("*.jsonl") for line in file.read_text(encoding="utf-8").splitlines()
    ]
    found = [Run(**json.loads(line)) for line in lines]
    return {(run.layout, run.case, run.fault): run for run in found}


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        pytest.param(layout.name, case.name, id=f"{layout.name}: {case.name}")
        for layout in LAYOUTS
        for case in CASES
        if case.stage in layout.stages
    ],
)
def test_layout_equals_one_process(runs: Runs, layout: str, case: str) -> None:
    run = runs[layout, case, ""]
    assert not run.problems
    assert run.loss <= TOLERANCE
    assert run.gradient <= TOLERANCE, run.where


@pytest.mark.parametrize(
    "fault", FAULTS, ids=[f"{fault.name} in {fault.layout.name}: {fault.case}" for fault in FAULTS]
)
def test_fault_is_seen(runs: Runs, fault: layouts.Fault) -> None:
    assert runs[fault.layout.name, fault.case, fault.name].difference > TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_trained_tensor_has_a_gradient_to_compare(folder: Path, case: layouts.Case) -> None:
    states = torch.load(folder / f"{case.name}.pt")["states"]
    largest = {key: max(float(state[key].abs().max()) for state in states) for key in states[0]}
    gated = ("linear_fc1.weight", "linear_fc2.weight", "log_alpha", "lambdas")
    for key, value in largest.items():
        if any(name in key for name in ("hard_mask", "frozen", "gate.input", "expert_load", "set_load")):
            continue  # buffers
        is_trained = case.stage != "expert" or (".layers.0." not in key and key.endswith(gated))
        assert (value > NOTICEABLE) if is_trained else (value == 0.0), key


def test_the_second_step_sees_the_load_of_the_whole_first_batch(folder: Path) -> None:
    first, second = torch.load(folder / "moe.pt")["states"]
    loads = [key for key in second if key.endswith("expert_load.load")]
    assert len(loads) == 3
    for key in loads:
        counts = first[key.removesuffix("load") + "counts"]
        assert counts.sum() == 2 * 4 * 16  # two experts for each token of the batch
        assert torch.equal(second[key], (counts / counts.sum()).float().double())
        assert (second[key] - 0.25).abs().max() > 0.01


def verdict(run: Run) -> str:
    return "equal" if run.difference <= TOLERANCE and not run.problems else "differs"


def tables(runs: Runs) -> str:
    """Return the matrix and the faults as markdown, without numbers that change from run to run."""
    head = ["layout", "processes", *(case.title for case in CASES)]
    rows = [
        [
            layout.name,
            str(layout.processes),
            *(verdict(runs[layout.name, c.name, ""]) if c.stage in layout.stages else "-" for c in CASES),
        ]
        for layout in LAYOUTS
    ]
    broken = [
        [fault.text, fault.layout.name, layouts.CASE[fault.case].title,
         verdict(runs[fault.layout.name, fault.case, fault.name])]
        for fault in FAULTS
    ]  # fmt: skip
    return (
        f"{START}\n\n`equal`: to {TOLERANCE:g} absolute, float32.\n\n"
        f"{markdown(head, rows)}\n\n"
        f"{markdown(['broken on purpose', 'layout', 'stage', 'result'], broken)}\n\n{END}"
    )


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def test_the_page_holds_the_tables_of_this_run(runs: Runs) -> None:
    check_page(PAGE, tables(runs))


def check_page(page: Path, wanted: str) -> None:
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    if os.environ.get("L0MOE_UPDATE_GOLDEN"):
        page.write_text(before + wanted + after, encoding="utf-8")
    assert page.read_text(encoding="utf-8") == before + wanted + after


def test_a_stale_page_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("L0MOE_UPDATE_GOLDEN", raising=False)
    page = tmp_path / "page.md"
    page.write_text(f"a\n{START}\n| PP2 | equal |\n{END}\nb\n", encoding="utf-8")
    check_page(page, f"{START}\n| PP2 | equal |\n{END}")
    with pytest.raises(AssertionError):
        check_page(page, f"{START}\n| PP2 | differs |\n{END}")


def test_every_fault_has_its_function() -> None:
    source = PROGRAM.with_name("layout_faults.py").read_text(encoding="utf-8")
    assert all(f"def {fault.name}(" in source for fault in FAULTS)
    runs_named: Callable[[int], set[str]] = lambda n: {layout.name for layout, _ in layouts.runs_of(n)}  # noqa: E731
    assert runs_named(1) | runs_named(2) | runs_named(4) == set(layouts.LAYOUT)

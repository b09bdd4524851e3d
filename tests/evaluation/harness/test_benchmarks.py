"""The real harness on two models whose answers are known, with made-up documents; every score worked by hand.

The dense model answers 7, True, B and `return 7`; the other one 8, True, A and `return 8`.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from bigram_model import END, write_model
from made_up_benchmarks import write_local_copies

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.evaluation.harness import benchmarks, code_execution, lm_eval_call
from megatron_l0moe.evaluation.harness.benchmarks import compare, run_benchmarks
from megatron_l0moe.evaluation.harness.lm_eval_call import HarnessCall
from megatron_l0moe.recipe.sections import BenchmarkSection

pytest.importorskip("lm_eval")
ROW = {
    "task": "gsm8k",
    "metric": "exact_match",
    "filter": "strict-match",
    "dense": {"value": 0.5},
    "l0moe": {"value": 0.25},
    "ratio": {"value": 0.5},
}
GSM8K = ("gsm8k", "exact_match,flexible-extract")
TASKS = ["gsm8k", "bbh_zeroshot_boolean_expressions", "mmlu_anatomy", "humaneval"]


def bigram(folder: Path, number: str, letter: str) -> Path:
    table = {"Answer:": " ", " ": number, "A:": "True", "\n": "    return ", "    return ": number}
    ends = dict.fromkeys(("7", "8", "True", "False", "A", "B"), END)
    return write_model(folder, table | ends, second={" ": letter})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmarks")
    return (
        bigram(root / "dense", "7", "B"),
        bigram(root / "moe", "8", "A"),
        write_local_copies(root / "local"),
    )


def make_section(local: Path, **changes: object) -> BenchmarkSection:
    settings = {
        "tasks": TASKS,
        "local_data": str(local),
        "num_fewshot": 1,
        "max_length": 1400,
        "allow_code_execution": True,
    }
    return BenchmarkSection.model_validate(settings | changes)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """Both models through the harness; HumanEval only where its programs can be isolated."""
    dense, moe, local = world
    try:
        code_execution.check_available()
        section = make_section(local)
    except L0MoEError:
        section = make_section(local, tasks=TASKS[:-1])
    out = tmp_path_factory.mktemp("out")
    return section, out, run_benchmarks(section, dense, moe, out, dtype="float32", device="cpu")


def row(result, task, kind):
    (found,) = [
        row for row in result["rows"] if (row["task"], f"{row['metric']},{row['filter']}") == (task, kind)
    ]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "kind", "documents", "dense", "moe"),
    [
        ("gsm8k", "exact_match,flexible-extract", 3, 2 / 3, 1 / 3),
        ("gsm8k", "exact_match,strict-match", 3, 0.0, 0.0),  # neither writes '#### NUMBER'
        ("bbh_zeroshot_boolean_expressions", "exact_match,strict-match", 2, 0.5, 0.5),
        ("bbh_zeroshot_boolean_expressions", "exact_match,flexible-extract", 2, 0.5, 0.5),
        ("mmlu_anatomy", "acc,none", 3, 2 / 3, 1 / 3),
        ("humaneval", "pass@1,create_test", 2, 0.5, 0.5),
    ],
)
def test_scores_by_hand(finished, task, kind, documents, dense, moe):
    section, _, result = finished
    if task not in section.tasks:
        pytest.skip("programs cannot be isolated here")
    found = row(result, task, kind)
    assert (found["documents"], found["dense"]["value"], found["l0moe"]["value"]) == (
        documents,
        pytest.approx(dense),
        pytest.approx(moe),
    )
    assert found["difference"]["value"] == pytest.approx(moe - dense)
    assert found["ratio"]["value"] == (pytest.approx(moe / dense) if dense else None)


@pytest.mark.slow
def test_standard_errors_by_hand(finished):
    """GSM8K: dense 1, 1, 0 and L0-MoE 0, 0, 1. Harness: S = 1/sqrt(3), error 1/3. Differences -1, -1, 1: variance
    4/3, error 2/3. Ratio 1/2; m - r d = -1/2, -1/2, 1: variance 3/4, error sqrt(3/4 / 3) / (2/3) = 3/4."""
    found = row(finished[2], "gsm8k", "exact_match,flexible-extract")
    assert found["dense"]["stderr"] == pytest.approx(1 / 3)
    assert found["difference"]["stderr"] == pytest.approx(2 / 3)
    assert found["ratio"] == {"value": pytest.approx(0.5), "stderr": pytest.approx(0.75)}


@pytest.mark.slow
def test_result_says_how_it_was_made(finished, world):
    section, out, result = finished
    assert result["arguments"] == {
        "dtype": "float32",
        "trust_remote_code": False,
        "max_length": 1400,
        "batch_size": 1,
        "device": "cpu",
    }
    assert row(result, "gsm8k", "exact_match,strict-match")["fewshot"] == [1]
    assert row(result, "mmlu_anatomy", "acc,none")["version"] == ["1.0"]
    assert result["data"]["gsm8k"]["test"]["documents"] == 3
    assert len(result["data"]["gsm8k"]["train"]["sha256"]) == 64
    assert result["code_execution"]["allowed"] is ("humaneval" in section.tasks)
    assert not (out / "work").exists()  # no copies of the data stay
    answers = (out / "dense" / "gsm8k.samples.jsonl").read_text().splitlines()
    assert json.loads(answers[0])["answers"] == [[" 7"]]


@pytest.mark.slow
def test_finished_tasks_are_not_run_again(finished, world, monkeypatch):
    """A rerun starts nothing; without one result, that task and model alone are left (CONTROL)."""
    section, out, result = finished
    started = []
    monkeypatch.setattr(benchmarks, "run_command", lambda words, **_: started.append(Path(words[-1]).stem))
    again = run_benchmarks(section, world[0], world[1], out, dtype="float32", device="cpu")
    assert (started, again) == ([], result)
    fewer = section.model_copy(update={"tasks": ["gsm8k"]})
    assert row(run_benchmarks(fewer, world[0], world[1], out, dtype="float32", device="cpu"), *GSM8K) == row(
        result, *GSM8K
    )
    assert started == []
    file = out / "l0moe" / "gsm8k.json"
    kept = file.read_text()
    file.unlink()
    try:
        with pytest.raises(L0MoEError, match=r"gsm8k\.json is missing; remove it"):
            run_benchmarks(section, world[0], world[1], out, dtype="float32", device="cpu")
    finally:
        file.write_text(kept)
    assert started == ["l0moe"]


def test_chain_keeps_the_headline(tmp_path, monkeypatch):
    made = {"rows": [{**ROW, "headline": True}, {**ROW, "task": "part", "headline": False}]}
    given = {}
    monkeypatch.setattr(
        benchmarks, "run_benchmarks", lambda *words, **more: given.update(words=words, more=more) or made
    )
    recipe = SimpleNamespace(
        model=SimpleNamespace(path="dense"),
        evaluation=SimpleNamespace(dtype="bfloat16", benchmarks="section"),
    )
    assert benchmarks.run_in_chain(recipe, "section", tmp_path, tmp_path / "evaluate") == {
        "benchmarks": {"dense, l0moe, ratio": {"gsm8k exact_match,strict-match": [0.5, 0.25, 0.5]}}
    }
    assert given["words"] == ("section", Path("dense"), tmp_path / "export", tmp_path / "benchmarks")
    assert json.loads((tmp_path / "evaluate" / "benchmarks.json").read_text()) == made
    assert given["more"]["dtype"] == "bfloat16"


def test_preflight_refuses_before_any_work(world, tmp_path):
    """What would stop the stage hours later is said at once."""
    for changes, message in (
        ({"allow_code_execution": False}, "executes what the model writes"),
        ({"num_fewshot": 4, "tasks": ["gsm8k"]}, "needs 4 few-shot examples"),
    ):
        with pytest.raises(L0MoEError, match=message):
            benchmarks.prepare(make_section(world[2], **changes), tmp_path)


def test_process_skips_what_is_finished(tmp_path, monkeypatch):
    import lm_eval
    import lm_eval.api.registry
    import lm_eval.tasks

    ran = []
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: None)
    monkeypatch.setattr(lm_eval.api.registry, "get_model", lambda name: dict)
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **call: ran.extend(call["tasks"]))
    call = HarnessCall(
        backend="hf",
        model_arguments={},
        tasks=["a", "b", "c"],
        indexed=[],
        num_fewshot=None,
        limit=None,
        allow_code_execution=False,
        keys=dict.fromkeys("abc", "k"),
        results=str(tmp_path),
    )
    (tmp_path / "a.json").write_text('{"key": "k"}')
    (tmp_path / "b.json").write_text('{"key": "other settings"}')
    lm_eval_call.carry_out(call)
    assert ran == ["b", "c"]


def record(
    values: dict[str, list[float]], *, prompts: str = "p", group: float | None = None
) -> dict[str, object]:
    """A record as the harness' process writes it, of a group `g` with one task for each key."""
    scores = [
        {"task": name, "metric": "acc", "filter": "none", "value": sum(row) / len(row), "stderr": 0.1}
        for name, row in values.items()
    ]
    everything = [value for row in values.values() for value in row]
    mean = sum(everything) / len(everything) if group is None else group
    scores.append({"task": "g", "metric": "acc", "filter": "none", "value": mean, "stderr": None})
    return {
        "task": "g",
        "scores": scores,
        "members": {"g": sorted(values), **{name: [name] for name in values}},
        **{key: {name: len(row) for name, row in values.items()} for key in ("documents", "all_documents")},
        **{key: dict.fromkeys(values, 0) for key in ("fewshot", "versions", "generation")},
        "values": {name: {"acc,none": row} for name, row in values.items()},
        "prompts": dict.fromkeys(values, prompts),
        "seconds": 1.0,
    }


def test_group_by_hand():
    """Tasks of 2 and 4 documents. Differences 0, -1 | -1, 0, 0, 0: variances 1/2 and 1/4, error sqrt(2/2 + 4/4) / 6."""
    dense = record({"a": [1, 1], "b": [1, 0, 0, 1]})
    moe = record({"a": [1, 0], "b": [0, 0, 0, 1]})
    found = row(compare({"dense": [dense], "l0moe": [moe]}), "g", "acc,none")
    assert found["headline"]
    assert (found["documents"], found["tasks"]) == (6, 2)
    assert found["difference"] == {"value": pytest.approx(-1 / 3), "stderr": pytest.approx(2**0.5 / 6)}
    assert found["ratio"]["value"] == pytest.approx(0.5)
    # m - r d: 1/2, -1/2 | -1/2, 0, 0, 1/2: variances 1/2 and 1/6; sqrt(2/2 + 4/6) / 6 / (2/3)
    assert found["ratio"]["stderr"] == pytest.approx((5 / 3) ** 0.5 / 4)


def test_group_that_is_no_mean_over_documents_has_no_error():
    dense, moe = record({"a": [1, 1], "b": [1, 0, 0, 1]}, group=0.75), record({"a": [1, 1], "b": [0] * 4})
    found = row(compare({"dense": [dense], "l0moe": [moe]}), "g", "acc,none")
    assert found["ratio"] == {"value": pytest.approx((1 / 3) / 0.75), "stderr": None}


def test_other_prompts_are_refused():
    with pytest.raises(L0MoEError, match="did not get the same prompts in the task g"):
        compare({"dense": [record({"a": [1, 0]})], "l0moe": [record({"a": [1, 0]}, prompts="q")]})


def test_same_value_everywhere_and_single_documents():
    same = compare({"dense": [record({"a": [0, 0]})], "l0moe": [record({"a": [0, 0]})]})
    assert row(same, "a", "acc,none")["ratio"] == {"value": None, "stderr": None}
    single = compare({"dense": [record({"a": [1]})], "l0moe": [record({"a": [1]})]})
    assert row(single, "a", "acc,none")["ratio"] == {"value": 1.0, "stderr": None}

"""Names of tasks, local copies of every layout, and that a task with local documents is else the harness' own."""

import ast
import copy
import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from made_up_benchmarks import problem, sum_question, write, write_lines, write_local_copies

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.evaluation.harness.lm_eval_call import (
    check_installed,
    common_length,
    environment,
    model_arguments,
)
from megatron_l0moe.evaluation.harness.tasks import find_tasks, read_splits, write_task_files
from megatron_l0moe.recipe.sections import BenchmarkSection

pytest.importorskip("lm_eval")
SOURCE_KEYS = ("dataset_path", "dataset_name", "dataset_kwargs", "fewshot_split", "training_split")
"""What a task file of ours may say differently."""


@pytest.fixture
def local(tmp_path):
    return write_local_copies(tmp_path / "local")


def written(names, local, folder, *, num_fewshot=0):
    tasks = find_tasks(names, local=local is not None, allow_code_execution=True)
    return tasks, write_task_files(tasks, folder, local_data=local, num_fewshot=num_fewshot)


@pytest.mark.parametrize(
    "name",
    ["gsm8k", "gsm8k_cot", "bbh_cot_fewshot_boolean_expressions", "mmlu_anatomy", "humaneval_instruct"],
)
def test_only_the_documents_differ_from_the_harness_own_task(local, tmp_path, name):
    """Prompt, stop sequences, few-shot examples, filters and metric, read by the harness' own loader."""
    from lm_eval.tasks._yaml_loader import load_yaml

    shots = None if name.startswith("bbh") else 0
    tasks, _ = written([name], local, tmp_path / "tasks", num_fewshot=shots)
    ours = load_yaml(tmp_path / "tasks" / f"{name}.yaml", resolve_func=False)
    theirs = copy.deepcopy(tasks.configs[name])
    assert ours["dataset_path"] == "json"
    assert ours["task"] == name
    texts = json.dumps([ours, theirs])
    assert ("code_execution.pass_at_k" in texts) is name.startswith("humaneval")
    for config in (ours, theirs):
        for key in SOURCE_KEYS:
            config.pop(key, None)
        for item in [
            *config.get("metric_list", []),
            *(f for g in config.get("filter_list") or [] for f in g["filter"]),
        ]:
            for key in ("metric", "filter_fn"):  # the functions of the same name, ours and theirs
                if key in item:
                    item[key] = str(item[key]).rsplit(".", 1)[-1]
    assert ours == theirs
    theirs["doc_to_text"] = "Q"
    assert ours != theirs  # CONTROL


def test_functions_are_ours(tmp_path):
    """Also online, where the documents come from the hub."""
    written(["humaneval"], None, tmp_path)
    text = (tmp_path / "humaneval.yaml").read_text()
    assert "!function 'megatron_l0moe.evaluation.harness.code_execution.pass_at_k'" in text
    assert "!function 'megatron_l0moe.evaluation.harness.code_execution.build_predictions'" in text
    assert "lm_eval" not in text
    assert "dataset_path: openai/openai_humaneval" in text


def test_groups_and_tags_become_their_tasks():
    tasks = find_tasks(["bbh", "mmlu", "mmlu_stem_tasks"], local=True, allow_code_execution=False)
    assert {name: len(members) for name, members in tasks.members.items()} == {
        "bbh": 27,
        "mmlu": 57,
        "mmlu_stem_tasks": 19,
    }


def test_online_nothing_is_written_but_humaneval(tmp_path):
    _, used = written(["gsm8k", "bbh_cot_fewshot_navigate", "mmlu_anatomy"], None, tmp_path / "tasks")
    assert used == {}
    assert list((tmp_path / "tasks").iterdir()) == []


@pytest.mark.parametrize(
    ("names", "allowed", "message"),
    [
        (["gsm8"], True, r"'gsm8' is no task that local copies can stand in for.*did you mean 'gsm8k'"),
        (
            ["humaneval"],
            False,
            "executes what the model writes; set evaluation.benchmarks.allow_code_execution",
        ),
    ],
)
def test_refused_names(names, allowed, message):
    with pytest.raises(L0MoEError, match=message):
        find_tasks(names, local=True, allow_code_execution=allowed)


def test_part_of_a_group_is_missing(local, tmp_path):
    with pytest.raises(L0MoEError, match=r"causal_judgement.json does not exist.*bbh/SUBTASK.json"):
        written(["bbh"], local, tmp_path / "tasks", num_fewshot=None)


@pytest.mark.parametrize(
    ("name", "shots", "message"),
    [
        ("gsm8k", None, "needs 5 few-shot examples from the split 'train'"),
        ("mmlu_anatomy", 5, "needs 5 few-shot examples from the split 'dev'"),
        ("bbh_cot_fewshot_boolean_expressions", 4, "has 3 few-shot examples of its own and 4 are asked for"),
    ],
)
def test_too_few_examples(local, tmp_path, name, shots, message):
    with pytest.raises(L0MoEError, match=message):
        written([name], local, tmp_path / "tasks", num_fewshot=shots)


@pytest.mark.parametrize("layout", ["mmlu", "mmlu_redux ;", "mmlu_redux ,"])
def test_layouts_of_mmlu(tmp_path, layout):
    expected = [{"question": "How many, really?", "choices": ["0", "2", "4", "8"], "answer": 1}]
    if layout == "mmlu":
        write(tmp_path / "mmlu" / "test" / "anatomy_test.csv", '"How many, really?",0,2,4,8,B\n')
        write(tmp_path / "mmlu" / "dev" / "anatomy_dev.csv", "Toes,1,10,2,3,B\nEars,2,1,3,4,A\n")
    else:
        rows = ["question,choices,answer,error_type", "\"How many, really?\",\"['0', '2', '4', '8']\",1,OK"]
        if layout.endswith(";"):
            rows = ["question;choices;answer;error_type", "How many, really?;['0', '2', '4', '8'];1;OK"]
        write(tmp_path / "mmlu_redux" / "mmlu_anatomy.csv", "\n".join(rows) + "\n")
    assert read_splits(tmp_path, "cais/mmlu", "anatomy")["test"].documents == expected
    shots = 2 if layout == "mmlu" else None  # MMLU-redux has no development split
    written(["mmlu_anatomy"], tmp_path, tmp_path / "tasks", num_fewshot=shots)
    ours = yaml.safe_load((tmp_path / "tasks" / "mmlu_anatomy.yaml").read_text())
    assert sorted(ours["dataset_kwargs"]["data_files"]) == (["dev", "test"] if shots else ["test"])
    assert ("fewshot_split" in ours) is (shots is None)  # else it stays the harness' own, dev


def test_mac_roman_as_published(tmp_path):
    file = tmp_path / "mmlu_redux" / "mmlu_x.csv"
    file.parent.mkdir()
    file.write_bytes(b"question,choices,answer\nMy sister\xd5s,\"['a', 'b', 'c', 'd']\",0\n")
    assert read_splits(tmp_path, "cais/mmlu", "x")["test"].documents[0]["question"] == "My sister\u2019s"


def broken(folder: Path, kind: str) -> tuple[str, str]:
    """Write a broken copy; returns data set and subset."""
    if kind == "no folder":
        return "openai/gsm8k", ""
    write(folder / "x", "")
    if kind == "half a line":
        write(folder / "gsm8k" / "test.jsonl", '{"question": "a", "ans')
    elif kind == "other keys":
        write_lines(folder / "gsm8k" / "test.jsonl", [{"question": "a", "answer": 4}])
    elif kind == "no number":
        write_lines(folder / "gsm8k" / "test.jsonl", [{"question": "a", "answer": "seven"}])
    elif kind == "empty":
        write(folder / "gsm8k" / "test.jsonl", "\n")
    elif kind == "two training files":
        write_lines(folder / "gsm8k" / "test.jsonl", [sum_question(1)])
        for number in "12":
            write_lines(folder / "gsm8k" / f"train_{number}.jsonl", [sum_question(1)])
    elif kind == "list":
        write(folder / "bbh" / "x.json", "[]")
        return "SaylorTwift/bbh", "x"
    elif kind == "no zip":
        write(folder / "humaneval" / "HumanEval.jsonl.gz", json.dumps(problem(1)))
        return "openai/openai_humaneval", ""
    elif kind == "three choices":
        write(folder / "mmlu_redux" / "mmlu_x.csv", "question;choices;answer\nq;['a', 'b', 'c'];0\n")
        return "cais/mmlu", "x"
    elif kind == "letter":
        write(folder / "mmlu" / "test" / "x_test.csv", "q,a,b,c,d,E\n")
        return "cais/mmlu", "x"
    elif kind == "no header":
        write(folder / "mmlu_redux" / "mmlu_x.csv", "q,\"['a', 'b', 'c', 'd']\",0\nq,\"['a']\",0\n")
        return "cais/mmlu", "x"
    return "openai/gsm8k", ""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no folder", "local_data: the folder .* does not exist"),
        ("nothing", r"test.jsonl does not exist; local copies lie in gsm8k/test.jsonl"),
        ("half a line", r"test.jsonl:1 is not valid JSON"),
        ("other keys", "document 1 must be an object with the texts question, answer"),
        ("no number", r"test.jsonl:1: a GSM8K answer ends with '#### NUMBER'"),
        ("empty", "holds no document"),
        ("two training files", r"holds 2 files train\*.jsonl"),
        ("list", "must be an object with a list 'examples'"),
        ("no zip", "cannot be read"),
        ("three choices", "after 0 questions comes one of another form"),
        ("letter", "after 0 questions comes one of another form"),
        ("no header", "expected are the rows"),
    ],
)
def test_broken_copy_is_one_sentence(tmp_path, kind, message):
    dataset, subset = broken(tmp_path / "local", kind)
    with pytest.raises(L0MoEError, match=message) as caught:
        read_splits(tmp_path / "local", dataset, subset)
    assert "\n" not in str(caught.value)


def section(**changes: object) -> BenchmarkSection:
    return BenchmarkSection.model_validate({"tasks": ["gsm8k"]} | changes)


def parameters_of(backend: str) -> set[str]:
    """Parameters of the harness' model class, read from its source: importing it would import the engine."""
    file, name = {
        "hf": ("huggingface.py", "HFLM"),
        "vllm": ("vllm_causallms.py", "VLLM"),
        "sglang": ("sglang_causallms.py", "SGLangLM"),
    }[backend]
    package = importlib.util.find_spec("lm_eval").submodule_search_locations[0]
    tree = ast.parse((Path(package) / "models" / file).read_text())
    (model,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    (start,) = (node for node in model.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    return {argument.arg for argument in (*start.args.args, *start.args.kwonlyargs)}


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("hf", {"max_length": 99, "device": "cuda:0"}),
        ("vllm", {"max_model_len": 99}),
        ("sglang", {"context_length": 99}),
    ],
)
def test_arguments_of_each_backend_are_those_that_the_harness_takes(backend, expected):
    """Against the signature of the harness' own class; the engines themselves are neither installed nor started."""
    made = [
        model_arguments(
            section(backend=backend, batch_size=4),
            Path(name),
            dtype="bfloat16",
            device="cuda:0",
            max_length=99,
        )
        for name in ("dense", "moe")
    ]
    common = {"dtype": "bfloat16", "trust_remote_code": False, "batch_size": 4}
    assert made[0] == {"pretrained": "dense", **common, **expected}
    assert made[1] == {**made[0], "pretrained": "moe"}
    assert set(made[0]) <= parameters_of(backend)


def test_arguments_of_the_backend(tmp_path):
    more = section(backend="vllm", backend_arguments={"tensor_parallel_size": 2})
    made = model_arguments(more, tmp_path, dtype="float32", device="cpu", max_length=9)
    assert made["tensor_parallel_size"] == 2
    for name in ("trust_remote_code", "pretrained", "max_length"):
        with pytest.raises(L0MoEError, match=f"backend_arguments.{name} is set by this command"):
            model_arguments(
                section(backend_arguments={name: True}), tmp_path, dtype="float32", device="cpu", max_length=9
            )


def test_both_models_get_the_shorter_length(tmp_path):
    for name, length in (("a", 512), ("b", 128)):
        write(tmp_path / name / "config.json", json.dumps({"max_position_embeddings": length}))
    folders = [tmp_path / "a", tmp_path / "b"]
    assert common_length(folders, None) == 128
    assert common_length(folders, 100) == 100
    with pytest.raises(L0MoEError, match="must be at most the 128 positions"):
        common_length(folders, 200)


def test_offline_means_offline(tmp_path):
    offline = environment(offline=True, cache=tmp_path, code=False)
    assert offline["HF_HUB_OFFLINE"] == offline["HF_DATASETS_OFFLINE"] == "1"
    assert "HF_ALLOW_CODE_EVAL" not in offline
    assert "HF_HUB_OFFLINE" not in environment(offline=False, cache=tmp_path, code=True)


def test_missing_package_is_named(monkeypatch):
    with pytest.raises(L0MoEError, match="needs the package sglang, which is not installed"):
        check_installed(section(backend="sglang"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(L0MoEError, match=r"pip install 'megatron-l0moe\[evaluation\]'"):
        check_installed(section())


def test_section_refuses_doubles_and_empty_batches():
    for changes, message in (
        ({"tasks": ["a", "a"]}, "names a task twice"),
        ({"batch_size": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            section(**changes)
    assert section(batch_size="auto").batch_size == "auto"

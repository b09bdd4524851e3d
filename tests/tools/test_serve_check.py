"""The serving check's comparison, requests and faults, without vLLM; and a real server where its environment is."""

import http.server
import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import random_export
import serve_check
import serve_table
import torch
import vllm_server
from serve_table import Case, Reference, Row, compare, largest_difference
from sglang_rules import sglang_problems
from vllm_server import Completion, ServerError

from megatron_l0moe.checkpoints.safetensors_files import SafetensorsFolder
from megatron_l0moe.errors import L0MoEError

pytestmark = pytest.mark.slow  # several processes with transformers

ROOT = Path(__file__).parents[2]
SERVE_PYTHON = ROOT / ".venv-serve/bin/python"

ANSWER = {
    "choices": [
        {
            "text": " on",
            "prompt_token_ids": [5, 6, 7],
            "token_ids": [8, 9],
            "prompt_logprobs": [
                None,
                {"6": {"logprob": -1.0}},
                {"1": {"logprob": -9.0}, "7": {"logprob": -2.0}},
            ],
            "logprobs": {"token_logprobs": [-0.5, -0.25]},
        }
    ]
}
COMPLETION = Completion(prompt=(5, 6, 7), generated=(8, 9), logprobs=(-1.0, -2.0, -0.5, -0.25), text=" on")


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A small random export in each layout that vLLM gets."""
    root = tmp_path_factory.mktemp("exports")
    shape = random_export.small_shape
    return {
        "ernie4_5_moe": random_export.random_export(shape("llama-3-8b"), root / "a", "vllm"),
        "qwen2_moe": random_export.random_export(shape("llama-3-8b", renormalised=False), root / "b", "vllm"),
    }


def case(folder, **changes):
    return Case(name="model", folder=folder, **changes)


def reference(version, argmax=(6, 7, 8, 9), shift=0.0):
    return Reference(version=version, logprobs=[x + shift for x in COMPLETION.logprobs], argmax=argmax)


def test_reading_an_answer():
    assert vllm_server.read_completion(ANSWER) == COMPLETION


def test_equal_engines_pass_and_the_greedy_tokens_are_counted(exports):
    rows = compare(
        case(exports["ernie4_5_moe"]), COMPLETION, [reference("5"), reference("4", shift=1e-6)], "vLLM"
    )
    assert [(row.engine, row.greedy, row.verdict) for row in rows] == [
        ("transformers 4", "2/2", "equal"),
        ("vLLM", "2/2", "equal"),
    ]
    assert rows[0].difference == pytest.approx(1e-6)
    assert rows[1].layout == "ernie4_5_moe"


@pytest.mark.parametrize(
    ("references", "verdicts"),
    [
        ([reference("5"), reference("4", shift=1e-3)], ["DIFFERENT", "equal"]),
        ([reference("5", shift=1e-3), reference("4", shift=1e-3)], ["equal", "DIFFERENT"]),
        ([reference("5", argmax=(6, 7, 8, 1)), reference("4")], ["DIFFERENT", "DIFFERENT"]),
    ],
    ids=["old transformers", "vLLM", "greedy"],
)
def test_differences_fail(exports, references, verdicts):
    rows = compare(case(exports["ernie4_5_moe"]), COMPLETION, references, "vLLM")
    assert [row.verdict for row in rows] == verdicts


def test_a_fault_must_show(exports):
    fault = case(exports["ernie4_5_moe"], expected="fault")
    (hidden,) = compare(fault, COMPLETION, [reference("5"), reference("4")], "vLLM")
    (seen,) = compare(fault, COMPLETION, [reference("5", shift=0.5), reference("4")], "vLLM")
    assert (hidden.passed, seen.passed) == (False, True)
    assert serve_table.unserved(fault, "vLLM").passed


@pytest.mark.parametrize(("shift", "verdict"), [(0.5, "wrong, without an error"), (0.0, "right by chance")])
def test_what_nothing_was_written_to_is_shown_and_not_judged(exports, shift, verdict):
    unset = case(exports["ernie4_5_moe"], expected="unset")
    (row,) = compare(unset, COMPLETION, [reference("5", shift=shift)], "vLLM")
    assert (row.passed, row.verdict) == (True, verdict)


def test_numbers_that_are_none_are_different():
    assert math.isnan(largest_difference([0.0, -1.0], [0.0, math.nan]))
    row = Row(model="m", layout="l", engine="e", positions=1, difference=math.nan, greedy="2/2")
    assert json.loads(json.dumps(row.to_json(), allow_nan=False))["difference"] is None
    assert not row.passed
    assert "not a number" in serve_table.markdown([row])[-1]


@pytest.mark.parametrize("fault", [random_export.with_rolled_router, random_export.without_qkv_bias])
def test_faults_change_only_what_they_say(exports, tmp_path, fault):
    source = exports["qwen2_moe"]
    before, after = SafetensorsFolder(source), SafetensorsFolder(fault(source, tmp_path / "fault"))
    left_out = before.names - after.names
    changed = {n for n in after.names if not torch.equal(before.read(n), after.read(n))}
    if fault is random_export.with_rolled_router:
        assert (left_out, changed) == (set(), {"model.layers.1.mlp.gate.weight"})
    else:
        assert (len(left_out), changed) == (4 * 3, set())
    assert (tmp_path / "fault/tokenizer.json").is_file()


def test_transformers_in_a_process_of_its_own_sees_a_moved_router(exports, tmp_path):
    """The control of the serving check is not too small to be seen."""
    source = exports["ernie4_5_moe"]
    faulty = random_export.with_rolled_router(source, tmp_path / "fault")
    requests = [{"model": str(folder), "tokens": list(range(10, 50))} for folder in (source, source, faulty)]
    one, same, two = serve_check.ask_transformers(Path(sys.executable), None, requests)
    assert len(one.logprobs) == len(one.argmax) == 39
    assert one == same
    assert largest_difference(one.logprobs, two.logprobs) > 10 * serve_table.FAULT_ATOL


def test_a_transformers_that_fails_is_one_sentence(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no torch >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(L0MoEError, match=r"transformers failed in .*python: no torch"):
        serve_check.ask_transformers(broken, None, [])


def test_random_exports_keep_sglangs_rules(exports):
    assert sglang_problems(*serve_check.config_and_shapes(exports["ernie4_5_moe"])) == []


def test_the_docs_table_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"a\n{serve_table.BEGIN}\nold\n{serve_table.END}\nb\n")
    serve_table.write_docs(page, "new")
    assert page.read_text() == f"a\n{serve_table.BEGIN}\n\nnew\n\n{serve_table.END}\nb\n"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers like vLLM's server; refuses a prompt of no tokens."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps(ANSWER if request["prompt"] else {"error": "no prompt"}).encode()
        self.send_response(200 if request["prompt"] else 400)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_requests_and_refusals():
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    assert vllm_server.complete(address, [5, 6, 7], 2) == COMPLETION
    with pytest.raises(ServerError, match=r"answered with 400: .*no prompt"):
        vllm_server.complete(address, [], 2)
    server.shutdown()
    server.server_close()
    with pytest.raises(ServerError, match="did not answer"):
        vllm_server.complete(address, [5], 2)


def test_a_server_that_ends_and_its_children_are_ended(tmp_path):
    ended = tmp_path / "python"
    ended.write_text("#!/bin/sh\nexit 3\n")
    ended.chmod(0o755)
    with (
        pytest.raises(ServerError, match=r"ended with code 3 at its start; see .*log"),
        vllm_server.serve(tmp_path, python=ended, log=tmp_path / "log"),
    ):
        pass
    words = [
        sys.executable,
        "-c",
        "import subprocess, time; subprocess.Popen(['sleep', '99']); time.sleep(99)",
    ]
    process = subprocess.Popen(words, start_new_session=True)
    vllm_server.stop(process)
    assert process.returncode == -15


@pytest.mark.slow
@pytest.mark.skipif(not SERVE_PYTHON.is_file(), reason="needs the environment of scripts/setup_serve.sh")
def test_a_real_server(exports, tmp_path):
    with vllm_server.serve(exports["ernie4_5_moe"], python=SERVE_PYTHON, log=tmp_path / "log") as address:
        answer = vllm_server.complete(address, "two words", 8)
    request = [{"model": str(exports["ernie4_5_moe"]), "tokens": [*answer.prompt, *answer.generated]}]
    (found,) = serve_check.ask_transformers(Path(sys.executable), None, request)
    assert largest_difference(found.logprobs, answer.logprobs) < serve_table.LOGPROB_ATOL

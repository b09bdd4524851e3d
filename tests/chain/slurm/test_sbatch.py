"""The batch scripts, word by word. After a wanted change: L0MOE_UPDATE_GOLDEN=1 pytest FILE.

What a training job's script does with verdicts, signals and late files; srun, scontrol and squeue are stand-ins.
"""

import dataclasses
import importlib.util
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from gpu_readiness.models_7b import recipe_on
from toy_recipe import make_run, toy_architecture

from megatron_l0moe.chain.dry_run import show_jobs as show
from megatron_l0moe.chain.preflight import check_memory
from megatron_l0moe.chain.slurm import sbatch
from megatron_l0moe.chain.slurm.cluster import Cluster, experts_at_once, load_cluster
from megatron_l0moe.chain.slurm.sbatch import FUNCTIONS, array_text, render
from megatron_l0moe.chain.slurm.submit import Request
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.plan.plan import find_architecture
from megatron_l0moe.recipe.recipe import Recipe, load_recipe
from megatron_l0moe.runs.stages import STAGE_NAMES, Run, place_of, selection

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "slurm"
CLUSTERS = ROOT / "slurm" / "clusters"
LLAMA = Path("examples/llama3_8b.yaml")


def llama(**moe: Any) -> Run:
    """Return the example's run with another layout of MoE training."""
    raw = load_recipe(ROOT / LLAMA).model_dump()
    raw["moe_training"] |= moe
    return Run(recipe=Recipe.model_validate(raw), recipe_file=LLAMA, runs_dir=Path("runs"))


def text_of(run: Run, cluster: Cluster, name: str) -> str:
    architecture, _ = find_architecture(run.recipe.model.path)
    return render(run, architecture, cluster, name, place_of(run))


def check_golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("L0MOE_UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["experts", "moe", "evaluate"])
def test_64_nodes(name: str) -> None:
    """The example as it is, with `gpus: 512`; read by eye, number by number."""
    run = Run(recipe=recipe_on("llama3_8b", 512), recipe_file=LLAMA, runs_dir=Path("runs"))
    check_golden(f"llama3_64_nodes_{name}.sbatch", text_of(run, load_cluster(CLUSTERS / "plain.yaml"), name))


@pytest.mark.parametrize("name", ["curate", "moe"])
def test_container(name: str) -> None:
    cluster = load_cluster(CLUSTERS / "pyxis_infiniband.yaml")
    check_golden(f"container_{name}.sbatch", text_of(llama(), cluster, name))


@pytest.mark.parametrize("name", ["convert", "experts"])
def test_cpu_cluster(tmp_path: Path, name: str) -> None:
    parallel = {"processes": 2, "nodes": 2, "threads": 3}
    made = make_run(tmp_path, expert_training={"parallel": parallel, "global_batch_size": 2})
    run = Run(recipe=made.recipe, recipe_file=Path("toy.yaml"), runs_dir=Path("runs"))
    cluster = load_cluster(CLUSTERS / "small_cpu.yaml")
    check_golden(f"cpu_{name}.sbatch", render(run, toy_architecture(), cluster, name, place_of(run)))


def test_experts_that_are_made_without_training_are_one_step(tmp_path: Path) -> None:
    made = {method: make_run(tmp_path, expert_training__method=method) for method in ("l0", "obs")}
    cluster = load_cluster(CLUSTERS / "small_cpu.yaml")
    texts = {
        method: render(run, toy_architecture(), cluster, "experts", place_of(run))
        for method, run in made.items()
    }
    assert "#SBATCH --array=" in texts["obs"]
    assert '--index "$SLURM_ARRAY_TASK_ID"' in texts["obs"]
    for word in ("--phase prepare", "torch.distributed.run"):
        assert word in texts["l0"]
        assert word not in texts["obs"]
    done = subprocess.run(["bash", "-n"], input=texts["obs"], text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("cluster", sorted(CLUSTERS.glob("*.yaml")), ids=lambda file: file.stem)
def test_bash_reads_every_script(tmp_path: Path, cluster: Path) -> None:
    for name in STAGE_NAMES:
        text = text_of(llama(), load_cluster(cluster), name)
        done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), name


def test_paths_with_blanks_and_dollars_stay_one_word(tmp_path: Path) -> None:
    """What bash makes of the flags is what the job's own words are."""
    folder = tmp_path / 'a $b "c'
    folder.mkdir()
    made = make_run(folder)
    text = render(
        made, toy_architecture(), Cluster(gpus_per_node=0, cpus_per_node=4), "experts", place_of(made)
    )
    start, end = text.index("training=("), text.index("\n)\n", text.index("training=(")) + 3
    script = f"expert=003\n{text[start:end]}" + 'printf "%s\\n" "${training[@]}"'
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    job = sbatch.training_commands.expert_job(made, toy_architecture(), 3)
    assert said.splitlines() == job.program


@pytest.mark.parametrize(
    "flags",
    [
        {"tensorboard-dir": "boards/llama"},
        {"wandb-exp-name": "llama"},
        {"tensorboard-dir": "boards/expert_000", "wandb-exp-name": "a $b 000", "wandb-project": "expert_000"},
    ],
    ids=lambda flags: "+".join(flags),
)
def test_boards_and_names_of_experts_differ_in_the_array(tmp_path: Path, flags: dict[str, str]) -> None:
    """What bash makes of them for expert 3 is what the job of expert 3 has here."""
    made = make_run(tmp_path, expert_training__flags=flags)
    cluster = Cluster(gpus_per_node=0, cpus_per_node=4)
    text = render(made, toy_architecture(), cluster, "experts", place_of(made))
    start, end = text.index("training=("), text.index("\n)\n", text.index("training=(")) + 3
    script = f"expert=003\n{text[start:end]}" + 'printf "%s\\n" "${training[@]}"'
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    job = sbatch.training_commands.expert_job(made, toy_architecture(), 3)
    assert said.splitlines() == job.program
    assert sum("expert_003" in word for word in job.program) == 1 + len(flags.keys() - {"wandb-project"})


def test_a_gres_is_one_word(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    cluster = Cluster(gpus_per_node=1, cpus_per_node=4, gres="gpu --uid=0")
    assert "\n#SBATCH --gres='gpu --uid=0:1'\n" in render(made, None, cluster, "curate", place_of(made))


@pytest.mark.parametrize("runs", ["a\nb", "a\x1bb", "a\udcffb", "a\u2028b"])
def test_no_path_leaves_its_line(tmp_path: Path, runs: str) -> None:
    run = make_run(tmp_path)
    for change in ({"runs_dir": Path(runs)}, {"recipe_file": Path(runs)}):
        with pytest.raises(L0MoEError, match="a text may not hold the character"):
            dataclasses.replace(run, **change)


def test_scripts_never_end_well_before_the_marker() -> None:
    """Every `exit 0` stands behind a look at the marker."""
    for name in STAGE_NAMES:
        lines = text_of(llama(), load_cluster(CLUSTERS / "plain.yaml"), name).splitlines()
        for number, line in enumerate(lines):
            if "exit 0" in line:
                assert any('"$folder/DONE"' in near for near in lines[number - 2 : number + 1]), line


def test_a_flag_that_the_recipe_may_not_set_is_said_before_anything_is_queued(tmp_path: Path) -> None:
    run = make_run(tmp_path, moe_training__flags={"save": "x"})
    with pytest.raises(L0MoEError, match=r"moe_training\.flags may not set 'save'"):
        render(run, toy_architecture(), Cluster(gpus_per_node=0, cpus_per_node=4), "moe", place_of(run))


@pytest.mark.parametrize(
    ("indices", "text"),
    [([0], "0%2"), ([0, 1, 2], "0-2%2"), ([7, 3, 4, 9], "3-4,7,9%2"), (list(range(64)), "0-63%2")],
)
def test_array(indices: list[int], text: str) -> None:
    assert array_text(indices, 2) == text


def test_words_for_the_shell_are_quoted() -> None:
    cluster = load_cluster(CLUSTERS / "pyxis_infiniband.yaml")
    text = text_of(llama(), cluster, "moe")
    assert shlex.quote("([0]*8+[1]*24)") in text
    assert '--container-mounts="$PWD:$PWD,/shared/models:/shared/models,' in text


def test_scripts_for_use_by_hand_are_what_the_code_renders() -> None:
    """After a wanted change: python tools/render_slurm.py."""
    spec = importlib.util.spec_from_file_location("render_slurm", ROOT / "tools" / "render_slurm.py")
    assert spec
    assert spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    rendered = tool.texts()
    kept = {str(file.relative_to(ROOT)): file for file in (ROOT / "slurm" / "llama3_8b").iterdir()}
    assert kept.keys() == rendered.keys()
    for name, text in rendered.items():
        assert kept[name].read_text(encoding="utf-8") == text, name


@pytest.mark.parametrize(
    ("cluster", "gpus"),
    [("plain", 512), ("pyxis_infiniband", 64), ("small_cpu", 8)],
    ids=lambda value: str(value),
)
def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: str, gpus: int) -> None:
    """The one of 64 nodes was read by eye, number by number."""
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    request = Request(
        run=Run(recipe=recipe_on("llama3_8b", gpus), recipe_file=LLAMA, runs_dir=Path("runs")),
        selected=selection("l0moe", None, None),
        cluster=load_cluster(CLUSTERS / f"{cluster}.yaml"),
        cluster_file=Path(f"slurm/clusters/{cluster}.yaml"),
    )
    show(request, said.append)
    check_golden(f"dry_run_{cluster}.txt", "\n".join(said) + "\n")
    assert not list(tmp_path.iterdir())


def test_a_layout_that_does_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By how much, and what would fit; and not where the cluster file does not name its GPU."""
    monkeypatch.chdir(tmp_path)
    parallel = {"processes": 8, "expert": 8, "expert_tensor": 1}
    recipe = llama(parallel=parallel).recipe
    cluster = load_cluster(CLUSTERS / "plain.yaml")
    with pytest.raises(L0MoEError, match=r"^moe_training\.parallel: .*GiB") as caught:
        check_memory(recipe, cluster, selection("l0moe", "moe", "moe"))
    assert "\n" not in str(caught.value)
    check_memory(recipe, cluster.model_copy(update={"gpu": None}), selection("l0moe", "moe", "moe"))
    check_memory(recipe, cluster, selection("l0moe", "export", None))


@pytest.mark.parametrize(
    ("gpus", "said", "expected"), [(64, None, 32), (512, None, 64), (8, None, 4), (64, 5, 5), (None, None, 8)]
)
def test_experts_at_once(gpus: int | None, said: int | None, expected: int) -> None:
    """Two GPUs for each expert on 8 and 64 GPUs, eight on 512; 64 experts."""
    recipe = recipe_on("llama3_8b", gpus or 64)
    if gpus is None:
        recipe = recipe.model_copy(update={"gpus": None})
    cluster = Cluster(gpus_per_node=8, cpus_per_node=96, experts_at_once=said)
    assert experts_at_once(recipe, cluster) == expected
    run = Run(recipe=recipe, recipe_file=LLAMA, runs_dir=Path("runs"))
    assert f"#SBATCH --array=0-63%{expected}\n" in text_of(run, cluster, "experts")


SRUN = """#!/bin/bash
case "$*" in
  *"--phase prepare"*)
    echo prepare >> steps
    [ -n "$PREPARE_VERDICT" ] && echo "$PREPARE_VERDICT" > runs/toy/moe/verdict
    exit "${PREPARE:-0}" ;;
  *"--phase finish"*)
    echo finish >> steps
    [ -n "$VERDICT" ] && echo "$VERDICT" > runs/toy/moe/verdict
    [ -n "$MARKER" ] && : > runs/toy/moe/DONE
    exit 143 ;;
  *torch.distributed.run*)
    echo train >> steps
    for i in $(seq "${TENTHS:-0}"); do
      [ -e runs/toy/moe/stop ] && { echo stopped >> steps; exit 143; }
      /bin/sleep 0.1
    done
    exit 1 ;;
  *) echo "other: $*" >> steps; exit 0 ;;
esac
"""
SCONTROL = """#!/bin/bash
if [ "$1" = requeue ]; then echo "requeue $2" >> steps; else echo n1; fi
"""
SQUEUE = """#!/bin/bash
echo "${STATE:-RUNNING}"
"""
SLEEP = """#!/bin/bash
[ "$1" = infinity ] && exit 77
exec /bin/sleep 0.01
"""
WAITS = 77
"""Exit code of the stand-in that a script waits in, once it is queued again."""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("squeue", SQUEUE), ("sleep", SLEEP)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    made = make_run(tmp_path)
    run = type(made)(recipe=made.recipe, recipe_file=Path("recipe.yaml"), runs_dir=Path("runs"))
    for stage in ("curate", "assemble", "moe"):
        (tmp_path / "runs" / "toy" / stage).mkdir(parents=True)
    for stage in ("curate", "assemble"):
        (tmp_path / "runs" / "toy" / stage / "DONE").touch()
    cluster = Cluster(gpus_per_node=0, cpus_per_node=4, file_wait_seconds=3, max_requeues=2)
    file = tmp_path / "moe.sbatch"
    file.write_text(render(run, toy_architecture(), cluster, "moe", place_of(run)))
    return file


def start(script: Path, **env: str) -> "subprocess.Popen[str]":
    folder = script.parent
    variables = {
        "SLURM_JOB_ID": "5",
        "SLURM_JOB_NODELIST": "n1",
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
    }
    return subprocess.Popen(
        ["bash", str(script)], cwd=folder, env={**os.environ, **variables, **env}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def outcome(script: Path, **env: str) -> tuple[int, list[str], str]:
    """Run the script; returns exit code, steps and output."""
    process = start(script, **env)
    said, _ = process.communicate(timeout=30)
    steps = script.parent / "steps"
    return process.returncode, steps.read_text().splitlines() if steps.is_file() else [], said


@pytest.mark.parametrize(
    ("env", "code", "steps"),
    [
        ({"VERDICT": "done", "MARKER": "1"}, 0, ["prepare", "train", "finish"]),
        ({"VERDICT": "again"}, WAITS, ["prepare", "train", "finish", "requeue 5"]),
        ({"VERDICT": "stop"}, 1, ["prepare", "train", "finish"]),
        ({}, WAITS, ["prepare", "train", "finish", "requeue 5"]),
        ({"SLURM_RESTART_COUNT": "2"}, 1, ["prepare", "train", "finish"]),
        ({"VERDICT": "again", "SLURM_RESTART_COUNT": "9"}, WAITS, ["prepare", "train", "finish", "requeue 5"]),
        ({"PREPARE": "2"}, 1, ["prepare"]),
        ({"PREPARE": "1"}, WAITS, ["prepare", "requeue 5"]),
        ({"PREPARE_VERDICT": "done"}, WAITS, ["prepare", "requeue 5"]),
        ({"VERDICT": "again", "STATE": "COMPLETING"}, 1, ["prepare", "train", "finish"]),
    ],
    ids=[
        *("done", "again", "stop", "no verdict", "no verdict too often", "again is not counted", "refused"),
        *("prepare could not run", "done without its marker", "cancelled"),
    ],
)  # fmt: skip
def test_verdict(script: Path, env: dict[str, str], code: int, steps: list[str]) -> None:
    """Exit code 0 only with the marker; a job that is being cancelled is not queued again."""
    found = outcome(script, **env)
    assert found[:2] == (code, steps), found[2]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_asks_training_to_stop_and_is_waited_for(script: Path, number: int) -> None:
    process = start(script, TENTHS="100", VERDICT="again")
    steps = script.parent / "steps"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not (steps.is_file() and "train" in steps.read_text()):
        time.sleep(0.05)
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert steps.read_text().splitlines() == ["prepare", "train", "stopped", "finish", "requeue 5"], said
    assert f"got {signal.Signals(number).name[3:]}" in said


def test_a_late_file_is_waited_for_and_then_named(script: Path) -> None:
    marker = script.parent / "runs" / "toy" / "assemble" / "DONE"
    marker.unlink()
    code, steps, said = outcome(script)
    assert (code, steps) == (1, [])
    assert "runs/toy/assemble/DONE is not visible on n1 after 3 s" in said


def test_a_stage_that_is_done_is_left_alone(script: Path) -> None:
    (script.parent / "runs" / "toy" / "moe" / "DONE").touch()
    assert outcome(script)[:2] == (0, [])


def test_the_exit_code_of_a_command_that_ends_at_once_is_its_own() -> None:
    """The shell may have taken note of its end before the first look; code 1 then came of a command that did well."""
    function = FUNCTIONS[FUNCTIONS.index("run() {") : FUNCTIONS.index('say "job')]
    program = f"""set -uo pipefail
{function}
for i in {{1..200}}; do run true || echo wrong; run bash -c "exit 7"; [ $? = 7 ] || echo wrong; done
"""
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

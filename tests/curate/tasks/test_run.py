"""The same bytes from every executor: this process, local workers, Ray, and Slurm's job script run by stand-ins.

Slurm's own commands are stand-ins on the PATH; the job script, the pickled pipeline and the waiting are the real ones.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import curate_worlds as worlds
import numpy as np
import pytest

from megatron_l0moe.curate.curate import curate
from megatron_l0moe.curate.tasks import run
from megatron_l0moe.curate.tasks import step as watch
from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.sections import ExecutorSection


def units(out: Path) -> dict[str, int]:
    return {
        step: len(list((out / "work" / step).rglob("[0-9]*.npy"))) for step in ("scan", "embed", "tokenise")
    }


def test_tasks_do_not_change_a_byte(expected, recipe_with, tmp_path: Path) -> None:
    made = units(tmp_path / "expected")
    assert min(made.values()) >= 3, made  # else this test would show nothing
    for tasks in (2, 7, 1000):
        curate(recipe_with(executor={"tasks": tasks}), tmp_path / f"{tasks}")
        assert worlds.checksums(tmp_path / f"{tasks}") == expected
    curate(recipe_with(matching="none", delta=0.2), tmp_path / "other")
    assert worlds.checksums(tmp_path / "other") != expected  # control


@pytest.mark.slow
def test_ray(expected, recipe_with, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    section = {"kind": "ray", "workers": 2, "tasks": 2, "mem_per_cpu_gb": 1}
    curate(recipe_with(executor=section), tmp_path / "out")
    assert worlds.checksums(tmp_path / "out") == expected


SBATCH = """#!/bin/bash
# sbatch [--export=...] FILE: run the tasks of a job array in the background, in this place.
for argument; do
  case $argument in --export=ALL,*) export "${argument#--export=ALL,}" ;; --*) ;; *) script=$argument ;; esac
done
echo "$*" >> "$FAKE_SLURM/submitted"
job=$(wc -l < "$FAKE_SLURM/submitted")
cp "$script" "$FAKE_SLURM/$job.sh"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
touch "$FAKE_SLURM/$job.queued"
export SLURM_JOB_ID=$job SLURM_NODELIST=n1
( for i in $(seq 0 "$last"); do
    SLURM_ARRAY_TASK_ID=$i bash "$FAKE_SLURM/$job.sh" >> "$FAKE_SLURM/$job.log" 2>&1
  done; rm "$FAKE_SLURM/$job.queued" ) > /dev/null 2>&1 &
echo "Submitted batch job $job"
"""
SQUEUE = '#!/bin/bash\n[ -e "$FAKE_SLURM/${!#}.queued" ] && echo "${!#} RUNNING"\nexit 0\n'
SRUN = '#!/bin/bash\nshift 3\nexec "$@"\n'  # -l -n 1
SCONTROL = "#!/bin/bash\necho n1\n"
SCANCEL = '#!/bin/bash\necho "$1" >> "$FAKE_SLURM/cancelled"\n'


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for Slurm's commands; returns the folder in which they leave what they were told."""
    state, commands = tmp_path / "slurm", tmp_path / "bin"
    state.mkdir()
    commands.mkdir()
    for name, text in zip(
        ("sbatch", "squeue", "srun", "scontrol", "scancel"),
        (SBATCH, SQUEUE, SRUN, SCONTROL, SCANCEL),
        strict=True,
    ):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("FAKE_SLURM", str(state))
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setattr(run, "POLL_SECONDS", 0.2)
    return state


SLURM = {
    "kind": "slurm", "workers": 1, "tasks": 1, "cpus_per_task": 1, "mem_per_cpu_gb": 3, "gpus_per_task": 1,
    "slurm": {"partition": "cpu", "time": "01:30:00", "qos": "high", "sbatch": {"account": "me"}},
}  # fmt: skip


@pytest.mark.slow
def test_slurm(expected, recipe_with, tmp_path: Path, slurm: Path, caplog) -> None:
    caplog.set_level("INFO")
    curate(recipe_with(executor=SLURM), tmp_path / "out")
    assert worlds.checksums(tmp_path / "out") == expected
    scripts = {f.stem: f.read_text().splitlines() for f in slurm.glob("*.sh")}
    assert len(scripts) == 3
    scan = next(lines for lines in scripts.values() if "#SBATCH --job-name=l0moe-scan" in lines)
    wanted = {
        "#SBATCH --array=0-0%1", "#SBATCH --cpus-per-task=1", "#SBATCH --mem-per-cpu=3G", "#SBATCH --partition=cpu",
        "#SBATCH --time=01:30:00", "#SBATCH --account=me", "#SBATCH --requeue", "#SBATCH --qos=high",
        f'export PATH="{Path(sys.executable).parent}:$PATH"',
    }  # fmt: skip
    assert wanted <= set(scan)
    with_gpu = [name for name, lines in scripts.items() if "#SBATCH --gpus=1" in lines]
    assert ["#SBATCH --job-name=l0moe-embed" in scripts[name] for name in with_gpu] == [True]
    assert "waiting for Slurm job 1: 0 of 1 tasks of scan done" in caplog.text


def test_slurm_jobs_that_end_without_being_done(recipe_with, tmp_path: Path, slurm: Path) -> None:
    section = {**SLURM, "slurm": {"partition": "cpu", "environment": "exit 3"}}
    message = (
        r"Slurm job 1 ended with 1 of 1 task\(s\) of scan not done \(the first is task 0\); see .*slurm_logs"
    )
    with pytest.raises(L0MoEError, match=message):
        curate(recipe_with(executor=section), tmp_path / "out")


def test_a_driver_that_comes_back_waits_for_the_job_that_runs(
    recipe_with, tmp_path: Path, slurm: Path
) -> None:
    section = {**SLURM, "slurm": {"partition": "cpu", "environment": "sleep 1; exit 3"}}
    out = tmp_path / "out"
    with pytest.raises(L0MoEError, match="Slurm job 1 ended"):
        curate(recipe_with(executor=section), out)
    (slurm / "1.queued").touch()
    threading.Timer(1.0, (slurm / "1.queued").unlink).start()
    submitted = (slurm / "submitted").read_text()
    with pytest.raises(L0MoEError, match="Slurm job 1 ended"):
        curate(recipe_with(executor=section), out)
    assert (slurm / "submitted").read_text() == submitted
    with pytest.raises(L0MoEError, match="Slurm job 2 ended"):
        curate(recipe_with(executor=section), out)


def test_without_slurm(recipe_with, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(L0MoEError, match="sbatch could not submit the tasks of scan"):
        curate(recipe_with(executor=SLURM), tmp_path / "out")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    with pytest.raises(L0MoEError, match="cannot be done inside a task of a job array"):
        curate(recipe_with(executor=SLURM), tmp_path / "out")


def test_what_ray_would_wait_for_without_end_is_refused() -> None:
    have = {"CPU": 4.0, "memory": 8 * 1024.0**3}
    run._check_resources(ExecutorSection(cpus_per_task=2, mem_per_cpu_gb=4), have)
    for change, key in (({"cpus_per_task": 5}, "cpus_per_task"), ({"mem_per_cpu_gb": 9}, "mem_per_cpu_gb"),
                        ({"gpus_per_task": 1}, "gpus_per_task")):  # fmt: skip
        with pytest.raises(L0MoEError, match=rf"whole Ray cluster has .* lower data\.executor\.{key}"):
            run._check_resources(ExecutorSection(**change), have)


def test_slurm_needs_its_section(recipe_with) -> None:
    with pytest.raises(ValueError, match=r"kind is slurm, but the section slurm is missing"):
        recipe_with(executor={"kind": "slurm"})


@pytest.mark.slow
def test_an_error_in_a_worker_is_one_sentence(recipe_with, small_units, tmp_path: Path, corpus: Path) -> None:
    (corpus / "z.jsonl").write_text("broken\n" * 50)
    with pytest.raises(L0MoEError, match=r"51 of 116 document\(s\) of corpus .* cannot be used"):
        curate(recipe_with(), tmp_path / "out")  # of the driver
    filters = {"quality_signals": {"rps_doc_word_count": {"min": 5}}}
    with pytest.raises(L0MoEError):
        curate(recipe_with(filters=filters, executor={"workers": 2}), tmp_path / "out")


@pytest.mark.slow
def test_a_killed_local_worker_stops_the_run_and_another_run_goes_on(
    expected, recipe_with, tmp_path: Path, monkeypatch
) -> None:
    """As when memory runs out. The pool alone would wait for ever."""
    out = tmp_path / "out"
    recipe = recipe_with(executor={"workers": 2, "tasks": 4})
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.1)
    killed: list[int] = []

    def kill_first_worker() -> None:
        while not killed:
            for state in watch.task_states(out / "work" / "embed").values():
                if state["pid"] != os.getpid() and not killed:
                    os.kill(state["pid"], signal.SIGKILL)
                    killed.append(state["pid"])
            time.sleep(0.02)

    thread = threading.Thread(target=kill_first_worker, daemon=True)
    thread.start()
    with pytest.raises(
        L0MoEError, match=r"A worker of embed was killed from outside.*lower data\.executor\.workers"
    ):
        curate(recipe, out)
    thread.join()
    curate(recipe, out)
    assert worlds.checksums(out) == expected


def test_bge_m3_in_the_pipeline(corpus, tiny_lm, tiny_bge_m3, small_units, tmp_path: Path) -> None:
    """FlagEmbedding's BGEM3FlagModel on a small checkpoint in BGE-M3's layout."""
    for tasks in (1, 3):
        recipe = worlds.make_recipe(corpus, tiny_lm, tiny_bge_m3, executor={"tasks": tasks})
        assert curate(recipe, tmp_path / f"{tasks}")["heldout_sequences"] == 6
    assert worlds.checksums(tmp_path / "1") == worlds.checksums(tmp_path / "3")


def test_vectors_are_float16_with_ids(expected, tmp_path: Path) -> None:
    folder = tmp_path / "expected" / "work" / "embed"
    vectors = [np.load(file, mmap_mode="r") for file in sorted(folder.glob("[0-9]*[0-9].npy"))]
    ids = np.concatenate([np.load(file) for file in sorted(folder.glob("*.ids.npy"))])
    assert {v.dtype for v in vectors} == {np.dtype(np.float16)}
    assert sum(map(len, vectors)) == len(ids) == len(set(ids.tolist()))
    norms = np.linalg.norm(np.concatenate(vectors).astype(np.float32), axis=1)
    np.testing.assert_allclose(norms, 1, atol=2**-10)  # float16 keeps 11 bits

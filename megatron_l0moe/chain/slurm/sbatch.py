"""The batch script of each stage as text, for `sbatch`. Pure: nothing is read, written or started here.

A training job runs one task on each node in three steps: `--phase prepare` on one node, torchrun on all of them,
`--phase finish` on one node, which leaves its verdict in a file, since exit codes of srun can lie. Every other stage
is one step. The bash that is the same in every run comes first; `str.format` fills in the rest.
"""

import re
import shlex
import sys
from collections.abc import Iterator

from megatron_l0moe.chain import training_commands
from megatron_l0moe.chain.slurm.cluster import (
    Cluster,
    OptionValue,
    Resources,
    experts_at_once,
    resources,
)
from megatron_l0moe.runs.stage_folder import MARKER
from megatron_l0moe.runs.stages import TRAINING, Place, Run, spec_of, stage_command
from megatron_l0moe.sizes.architecture import Architecture

SETUP_BEGINS = "# The cluster's own lines come before `set -u`, which many set-up scripts do not survive."
SETUP_ENDS = "set -uo pipefail"
"""Around the lines of the cluster file."""
FUNCTIONS = r"""say() { echo "$(date +%H:%M:%S) | $stage: $*"; }

# shellcheck disable=SC2329 # a trap calls it
# Go back into the queue and stay until Slurm ends this script: leaving would end the job for good.
# A job that is being cancelled must not come back, so Slurm is asked first; if it does not answer, again.
requeue() {
  local state
  trap - USR1 TERM
  while true; do
    state=$(squeue --noheader --jobs="$job" --format=%T)
    case $state in
      RUNNING) scontrol requeue "$job" && break ;;
      ?*) say "the job is $state and is not queued again"; exit 1 ;;
    esac
    say "Slurm does not take the job back yet; asking again"
    sleep 10
  done
  say "queued again, after $1"
  exec sleep infinity
}

# A shared file system may show a file late.
wait_for() {
  local file waited=0
  for file in "$@"; do
    until [ -e "$file" ]; do
      if [ "$waited" -ge "$file_wait" ]; then
        say "$file is not visible on $head after $waited s"
        return 1
      fi
      ls "$(dirname "$file")" > /dev/null 2>&1 # makes a network file system look again
      sleep 1
      waited=$((waited + 1))
    done
  done
}

# Run a command in the background and wait until it is really gone: `wait` returns early when a signal comes.
run() {
  local pid code last
  "$@" &
  pid=$!
  while true; do
    wait "$pid"
    code=$?
    kill -0 "$pid" 2> /dev/null || break
  done
  wait "$pid" 2> /dev/null # a signal may have come just before its end; 127: its code is known already
  last=$?
  if [ "$last" -ne 127 ]; then code=$last; fi
  return "$code"
}

say "job $job on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1))"
"""

TRAIN = r"""# A signal comes before the time limit, or when another job takes the nodes. Training looks for the file
# `stop` after every step; then it saves and ends.
told=
# shellcheck disable=SC2329 # the trap calls it
on_signal() {{
  told=$1
  say "got $1: training saves and ends at its next step"
  : > "$folder/stop"
}}
trap 'on_signal USR1' USR1
trap 'on_signal TERM' TERM

if [ -e "$folder/{marker}" ]; then
  say "is done"
  exit 0
fi
wait_for {inputs} || exit 1
rm -f "$folder/verdict"
mkdir -p "$L0MOE_LOG_DIR"

# 1. Checks and records; exit code 2 means that going on is no use, and says why. A verdict: there is nothing to train.
run "${{one_node[@]}}" "${{command[@]}}" --phase prepare
code=$?
if [ "$code" -eq 2 ]; then exit 1; fi

# 2. Training: one torchrun on each node, which starts a process for each GPU.
if [ "$code" -eq 0 ] && [ -z "$told" ] && ! [ -e "$folder/verdict" ]; then
  export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE="[rank\${{rank}}]: "
  # shellcheck disable=SC2016 # a node's own number is known on the node only
  run "${{all_nodes[@]}}" --kill-on-bad-exit=1 --wait=60 bash -c '
    exec "$0" -m torch.distributed.run --node-rank "$SLURM_NODEID" \
      --log-dir "$L0MOE_LOG_DIR/node_$SLURM_NODEID" "$@"
  ' {python} "${{launcher[@]}}" "${{training[@]}}"
  say "torchrun ended with exit code $?"
fi

# 3. The verdict.
if [ "$code" -eq 0 ] && ! [ -e "$folder/verdict" ]; then
  trap 'requeue "a signal"' USR1 TERM
  run "${{one_node[@]}}" "${{command[@]}}" --phase finish
  wait_for "$folder/verdict"
fi
case $(cat "$folder/verdict" 2> /dev/null) in
  done) wait_for "$folder/{marker}" && exit 0 ;;
  again) requeue "a checkpoint" ;;
  stop) exit 1 ;;
esac
if [ "${{SLURM_RESTART_COUNT:-0}}" -lt "$max_requeues" ]; then requeue "a step that could not run"; fi
say "no verdict in $folder after $max_requeues restarts"
exit 1
"""

OTHER = r"""# Another job takes the nodes{or_limit}: the stage is started again later.
trap 'requeue "a signal"' {signals}

if [ -e "$folder/{marker}" ]; then
  say "is done"
  exit 0
fi
wait_for {inputs} || exit 1
run "${{one_node[@]}}" "${{command[@]}}"
code=$?
if [ "$code" -eq 0 ]; then wait_for "$folder/{marker}" || code=1; fi
exit "$code"
"""


EXPERT = "@EXPERT@"
"""Stands for an expert's number, with three digits, until it becomes a variable of the script."""


def render(run: Run, architecture: Architecture | None, cluster: Cluster, name: str, place: Place) -> str:
    """Return the batch script of a stage.

    Args:
        architecture: the dense model's sizes; only a stage that trains needs them.

    Raises:
        L0MoEError: the recipe wants more of a node than it has, or sets a flag that it may not.
    """
    need = resources(name, run.recipe, cluster)
    blocks = [
        "#!/bin/bash\n" + "\n".join(f"#SBATCH {line}" for line in _options(run, cluster, name, place, need)),
        _header(run, name, place),
        _environment(cluster),
        _variables(run, cluster, name, place, need),
        FUNCTIONS,
    ]
    if _trains(run, name):
        assert architecture is not None, "a training job needs the model's sizes"
        blocks += _training(run, architecture, cluster, name, place, need)
    else:
        blocks.append(_other(run, cluster, name))
    return "\n\n".join(block.strip() for block in blocks) + "\n"


def array_text(indices: list[int], at_once: int) -> str:
    """Return indices as sbatch's --array takes them: `0-3,7%2`."""
    parts: list[str] = []
    for index in sorted(indices):
        first, _, last = parts[-1].partition("-") if parts else ("", "", "")
        if parts and int(last or first) + 1 == index:
            parts[-1] = f"{first}-{index}"
        else:
            parts.append(str(index))
    return f"{','.join(parts)}%{at_once}"


def _options(run: Run, cluster: Cluster, name: str, place: Place, need: Resources) -> Iterator[str]:
    stage = cluster.stage(name)
    yield f"--job-name=l0moe-{run.recipe.name}-{name}"
    yield f"--output={shlex.quote(str(place.log(name)))}"
    yield "--open-mode=append"
    yield "--requeue"
    yield "--kill-on-invalid-dep=yes"
    for option, value in (
        ("partition", stage.partition or cluster.partition),
        ("account", stage.account or cluster.account),
        ("qos", stage.qos or cluster.qos),
        ("constraint", cluster.constraint),
        ("reservation", cluster.reservation),
    ):
        if value:
            yield f"--{option}={shlex.quote(value)}"
    yield f"--nodes={need.nodes}"
    yield "--ntasks-per-node=1"
    yield f"--cpus-per-task={need.cpus}"
    if need.gpus:
        yield f"--gres={shlex.quote(f'{cluster.gres}:{need.gpus}')}"
    if need.memory:
        yield f"--mem={need.memory}"
    if need.exclusive:
        yield "--exclusive"
    yield f"--time={need.time}"
    if spec_of(name, run.recipe.method).restart != "clear":
        yield f"--signal=B:USR1@{cluster.signal_lead_seconds}"
    if name == "experts":
        yield f"--array={array_text(list(range(run.recipe.model.num_experts)), experts_at_once(run.recipe, cluster))}"
    for option, setting in {**cluster.sbatch, **stage.sbatch}.items():
        yield _option(option, setting)


def _option(name: str, value: OptionValue) -> str:
    return f"--{name}" if value is True else f"--{name}={shlex.quote(str(value))}"


def _header(run: Run, name: str, place: Place) -> str:
    inputs = spec_of(name, run.recipe.method).inputs
    after = [f"# It needs the results of {', '.join(inputs)}."] if inputs else []
    return "\n".join(
        [
            f"# Stage {name} of the run {run.recipe.name}: {spec_of(name, run.recipe.method).does}.",
            *after,
            "# Rendered by `l0moe run RECIPE --launcher slurm --cluster FILE`. By hand, from the same folder:",
            f"#   mkdir -p {shlex.quote(str(place.logs))} && sbatch {shlex.quote(str(place.script(name)))}",
        ]
    )


def _trains(run: Run, name: str) -> bool:
    """Whether a stage's job starts torchrun on all its nodes; experts made without training are one step."""
    return name in TRAINING and not (name == "experts" and run.recipe.construction is not None)


def _environment(cluster: Cluster) -> str:
    lines = [SETUP_BEGINS]
    if cluster.modules:
        lines.append(f"module load {shlex.join(cluster.modules)} || exit 1")
    lines += cluster.setup
    lines += [f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()]
    return "\n".join([*lines, SETUP_ENDS])


def _variables(run: Run, cluster: Cluster, name: str, place: Place, need: Resources) -> str:
    lines = [f"stage='{name}'"]
    if name == "experts":
        lines += [
            'expert=$(printf "%03d" "$SLURM_ARRAY_TASK_ID")',
            "job=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}",
        ]
    else:
        lines.append("job=$SLURM_JOB_ID")
    lines += [
        f"folder={_quote(_folder(run, name))}",
        f"file_wait={cluster.file_wait_seconds} # seconds",
        *([f"max_requeues={cluster.max_requeues}"] if _trains(run, name) else []),
        f"export L0MOE_SBATCH_FILE={shlex.quote(str(place.script(name)))}",
        "# Slurm's own name of the first node; the task of rank 0 runs there, and so does this script.",
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
    ]
    step = ["srun", "--overlap", f"--mpi={cluster.mpi}", f"--cpus-per-task={need.cpus}"]
    lines += [
        "# One step runs after the other; --overlap: none waits for one that a restarted controller believes to run.",
        "step=(",
        *(f"  {_quote(word)}" for word in step),
        *_container(cluster),
        ")",
    ]
    lines.append(f"command=({_stage_words(run, cluster, name)})")
    lines.append('one_node=("${step[@]}" --nodes=1 --ntasks=1 --nodelist="$head")')
    if _trains(run, name):
        lines.append(f'all_nodes=("${{step[@]}}" --nodes={need.nodes} --ntasks={need.nodes})')
    return "\n".join(lines)


def _container(cluster: Cluster) -> list[str]:
    container = cluster.container
    if container is None:
        return []
    mounts = "".join(f",{_in_quotes(mount)}" for mount in container.mounts)
    return [
        f"  --container-image={shlex.quote(container.image)}",
        f'  --container-mounts="$PWD:$PWD{mounts}"',
        '  --container-workdir="$PWD"',
        *(f"  {_option(name, value)}" for name, value in container.options.items()),
    ]


def _training(
    run: Run, architecture: Architecture, cluster: Cluster, name: str, place: Place, need: Resources
) -> Iterator[str]:
    job = training_job(run, architecture, name)
    ends = "0" if need.processes == 1 else f"0,{need.processes - 1}"  # Megatron speaks through the last rank
    yield "\n".join(
        [
            *(f"export {variable}={shlex.quote(value)}" for variable, value in job.env.items()),
            f"port=$(({cluster.master_port} + SLURM_JOB_ID % 1000)) # jobs that share a node differ",
            f'export L0MOE_LOG_DIR={shlex.quote(str(place.logs))}/"$stage/${{job}}_r${{SLURM_RESTART_COUNT:-0}}"',
            "launcher=(",
            f"  --nnodes {need.nodes} --nproc-per-node {need.processes}",
            '  --master-addr "$head" --master-port "$port"',
            f'  --tee 3 --local-ranks-filter "{ends}" # all ranks to files, these of each node to this log too',
            ")",
            "training=(",
            *(f"  {line}" for line in _flag_lines(job.program)),
            ")",
        ]
    )
    yield TRAIN.format(
        inputs=_needed(run, name),
        python=shlex.quote(_python(cluster)),
        marker=MARKER,
    )


def training_job(run: Run, architecture: Architecture, name: str) -> training_commands.TrainingCommand:
    """Return the training job of a stage; for `experts` with `EXPERT` in the place of the number."""
    if name == "moe":
        return training_commands.moe_job(run, architecture)
    first, second = (training_commands.expert_job(run, architecture, k) for k in (0, 1))
    words = [_without_number(run, *pair) for pair in zip(first.command, second.command, strict=True)]
    return training_commands.TrainingCommand(command=words, env=first.env)


def _without_number(run: Run, zeroth: str, first: str) -> str:
    """Return a word of the commands of experts 0 and 1 with `EXPERT` where they differ."""
    if zeroth == first:
        return zeroth
    folder = f"{run.stage_folder('experts')}/"
    # the expert's own folder, or a name that ends with it: the index, TensorBoard's folder, the name for W&B
    words = [
        word.replace(f"{folder}{k:03d}", f"{folder}{EXPERT}", 1)
        if word.startswith(folder)
        else f"{word.removesuffix(f'{k:03d}')}{EXPERT}"
        for k, word in enumerate((zeroth, first))
    ]
    assert words[0] == words[1], "experts differ by their number only"
    return words[0]


def _other(run: Run, cluster: Cluster, name: str) -> str:
    # Before a time limit a stage that starts anew has nothing to save, and the next start would meet the limit too.
    goes_on = spec_of(name, run.recipe.method).restart != "clear"
    return OTHER.format(
        or_limit=", or the time limit is near" if goes_on else "",
        signals="USR1 TERM" if goes_on else "TERM",
        inputs=_needed(run, name),
        marker=MARKER,
    )


def _stage_words(run: Run, cluster: Cluster, name: str) -> str:
    words = shlex.join(stage_command(run, name, python=_python(cluster)))
    return words + (' --index "$SLURM_ARRAY_TASK_ID"' if name == "experts" else "")


def _python(cluster: Cluster) -> str:
    return cluster.python or ("python" if cluster.container else sys.executable)


def _folder(run: Run, name: str) -> str:
    folder = run.stage_folder(name)
    return str(folder / EXPERT if name == "experts" else folder)


def _needed(run: Run, name: str) -> str:
    """Return the files that have to be visible before a job starts, as words of bash."""
    words = [shlex.quote(str(run.recipe_file))]
    for previous in spec_of(name, run.recipe.method).inputs:
        folder = shlex.quote(str(run.stage_folder(previous)))
        last = run.recipe.model.num_experts - 1
        words.append(
            f"{folder}/{{000..{last:03d}}}/{MARKER}" if previous == "experts" else f"{folder}/{MARKER}"
        )
    return " ".join(words)


def _flag_lines(words: list[str]) -> list[str]:
    """Return words with each flag and its value on a line of their own."""
    lines: list[str] = []
    for word in words:
        if word.startswith("--") or not lines:
            lines.append(_quote(word))
        else:
            lines[-1] += f" {_quote(word)}"
    return lines


def _quote(word: str) -> str:
    """Quote a word for bash; an expert's number becomes the variable."""
    if EXPERT not in word:
        return shlex.quote(word)
    return f'"{_in_quotes(word).replace(EXPERT, "${expert}")}"'


def _in_quotes(text: str) -> str:
    """Return text as it stands between double quotes."""
    return re.sub(r'([\\"$`])', r"\\\1", text)

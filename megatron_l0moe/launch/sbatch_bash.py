"""The bash of the batch scripts that is the same in every run; `str.format` fills in the rest."""

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

#!/usr/bin/env bash
# Run the parity set and ten steps of both stages on the GPUs of this machine, and print one verdict line.
#
#   tools/gpu_smoke.sh            all GPUs that CUDA shows, at most 8; minutes, no network, a toy model made from scratch
#   tools/gpu_smoke.sh --cpu 2    the same on 2 CPU processes with gloo, to test this script
#   --quick                       one layout a stage      --out FOLDER   keep the runs and logs there
#
# Exit code: 0 PASS, 1 FAIL, 2 wrong use, 3 no GPU. What it does and does not show: docs/gpu.md.
set -uo pipefail
cd "$(dirname "$0")/.."
PY="${PYTHON:-.venv/bin/python}"
CPU=0 QUICK=0 OUT=""
usage() { echo "Error: $1; use tools/gpu_smoke.sh [--cpu PROCESSES] [--quick] [--out FOLDER]." >&2; exit 2; }
while [ $# -gt 0 ]; do
  case "$1" in
    --cpu) [[ "${2:-}" =~ ^[1-8]$ ]] || usage "--cpu takes 1 to 8 processes, not '${2:-}'"; CPU="$2"; shift 2 ;;
    --quick) QUICK=1; shift ;;
    --out) [ -n "${2:-}" ] || usage "--out needs a folder"; OUT="$2"; shift 2 ;;
    *) usage "unknown option '$1'" ;;
  esac
done
[ -x "$PY" ] || usage "there is no $PY: run 'make setup' or set PYTHON"

if [ "$CPU" -gt 0 ]; then
  export CUDA_VISIBLE_DEVICES=""
  N="$CPU" MACHINE="CPU, gloo"
else
  N="$("$PY" -c 'from megatron_l0moe.runtime.hardware import visible_gpus; print(visible_gpus())')" || exit 1
  if [ "$N" -eq 0 ]; then
    echo "No GPU was found on this machine, so nothing was run; --cpu 2 runs the same on the CPU."
    exit 3
  fi
  MACHINE="$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)"
  "$PY" -c 'from megatron_l0moe.runtime.platform import has_transformer_engine as te; raise SystemExit(not te())' \
    2>/dev/null && MACHINE+=", Transformer Engine" || MACHINE+=", no Transformer Engine (local spec)"
fi
for size in 8 4 2 1; do [ "$N" -ge "$size" ] && { N="$size"; break; }; done

# Layouts: what is trained, and what is compared with one process.
EXPERT="distopt" MOE="distopt"
case "$N" in
  1) TRAIN='{}' TRAIN_MOE='{}' ;;
  2) TRAIN='{"tensor": 2}' TRAIN_MOE='{"expert": 2}' ;;
  4) TRAIN='{"tensor": 2}' TRAIN_MOE='{"tensor": 2, "expert": 4, "expert_tensor": 1}' ;;
  8) TRAIN='{"tensor": 2, "pipeline": 2}' TRAIN_MOE='{"tensor": 2, "pipeline": 2, "expert": 4, "expert_tensor": 1}' ;;
esac
[ "$N" -ge 2 ] && EXPERT="tp2,sp;dp2,distopt;pp2" MOE="ep2;ep2,allgather;dp2,distopt;tp2,sp;pp2"
[ "$N" -ge 4 ] && EXPERT+=";tp2,sp,pp2;tp2,sp,dp2,distopt" MOE+=";ep4;pp2,ep2;tp2,sp,ep4,etp1"
[ "$N" -ge 8 ] && EXPERT+=";tp2,sp,pp2,dp2" MOE+=";tp2,sp,pp2,ep4,etp1"
[ "$QUICK" -eq 1 ] && EXPERT="${EXPERT%%;*}" MOE="${MOE%%;*}"

[ -n "$OUT" ] || OUT="$(mktemp -d "${TMPDIR:-/tmp}/gpu_smoke.XXXXXX")"
mkdir -p "$OUT" && OUT="$(cd "$OUT" && pwd)" || exit 1
[ -z "$(ls -A "$OUT")" ] || usage "--out $OUT is not empty"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" SMOKE_OUT="$OUT" SMOKE_N="$N"
export SMOKE_TRAIN="$TRAIN" SMOKE_TRAIN_MOE="$TRAIN_MOE"
REASONS=()
run() { # run NAME COMMAND...: a step with its output in a log; a failure is a reason of the verdict
  local name="$1" log="$OUT/$1.log" start="$SECONDS"
  shift
  if "$@" >"$log" 2>&1; then
    echo "ok    $name ($((SECONDS - start)) s)"
  else
    echo "FAIL  $name ($((SECONDS - start)) s): $(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | cut -c1-300)"
    REASONS+=("$name, see $log")
    return 1
  fi
}

make_world() {
  PYTHONPATH=tests "$PY" - <<'PYTHON'
import json, os
from pathlib import Path
import yaml
from whole_chain import toy_world as toy

out, n = Path(os.environ["SMOKE_OUT"]), int(os.environ["SMOKE_N"])
experts, batch, steps, length = (4 if n >= 4 else 2), 8, 10, 32
toy.LAYERS, toy.HIDDEN, toy.FFN, toy.EXPERT_FFN, toy.DOCUMENTS = 4, 64, 128, 32, 80
toy.TOPICS = {**toy.TOPICS, "garden": "soil seed rose fern hedge mulch prune bloom shrub lawn tulip vine weed moss ivy oak"}
file = toy.make_world(out / "world")
recipe = yaml.safe_load(file.read_text())
recipe["name"] = "smoke"
recipe["model"]["num_experts"] = experts
recipe["data"] |= {"tokens_per_expert": steps * batch * length, "tokens_per_set": steps // 2 * batch * length}
layout = {"processes": n, "distributed_optimizer": True}
recipe["expert_training"] |= {
    "micro_batch_size": 1, "global_batch_size": batch, "parallel": layout | json.loads(os.environ["SMOKE_TRAIN"])
}
recipe["moe_training"] |= {
    "micro_batch_size": 1,
    "sequences_per_domain": batch // experts,
    "parallel": layout | json.loads(os.environ["SMOKE_TRAIN_MOE"]),
    "flags": {"bf16": True, "overlap-grad-reduce": True, "overlap-param-gather": True},
}
(out / "smoke.yaml").write_text(yaml.safe_dump(recipe))
PYTHON
}

check_steps() { # ten steps of finite numbers in every training job
  "$PY" - <<'PYTHON'
import json, math, os
from pathlib import Path

files = sorted((Path(os.environ["SMOKE_OUT"]) / "runs/smoke").glob("**/metrics.jsonl"))
assert len(files) >= 3, f"only {len(files)} training jobs wrote metrics"
for file in files:
    steps = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(steps) == 10, f"{file} holds {len(steps)} steps, not 10"
    numbers = [step[name] for step in steps for name in ("lm_loss", "grad_norm")]
    assert all(math.isfinite(number) for number in numbers), f"{file} holds a number that is not finite"
    print(file, "loss", numbers[0], "->", numbers[-2])
PYTHON
}

compare() { # compare STAGE LAYOUTS
  "$PY" tools/loss_compare.py --recipe "$OUT/smoke.yaml" --runs-dir "$OUT/runs" \
    --stage "$1" --layouts "$2"
}

echo "gpu_smoke: $N process(es) on $MACHINE; logs in $OUT"
if run make_world make_world &&
  run train "$PY" -m megatron_l0moe run "$OUT/smoke.yaml" --runs-dir "$OUT/runs" --until moe; then
  run check_steps check_steps
  run parity_expert compare expert "$EXPERT"
  run parity_moe compare moe "$MOE"
fi
if [ "${#REASONS[@]}" -eq 0 ]; then
  echo "PASS gpu_smoke: $N process(es) on $MACHINE; ten steps of both stages, layouts equal to one process: expert $EXPERT, moe $MOE"
else
  echo "FAIL gpu_smoke: $N process(es) on $MACHINE; $(IFS=';'; echo "${REASONS[*]}")"
  exit 1
fi

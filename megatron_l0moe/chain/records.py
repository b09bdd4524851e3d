"""What a training job was started from, written before its first step: recipe, code, packages, command, machine.

`FOLDER/records/attempt_NNN/` holds

| file | what |
|---|---|
| recipe.yaml | the recipe with every default filled in |
| config_hash | of the settings that decide the stage's result, as in its manifest |
| commit | of the source tree, `+changes` when it was edited |
| diff.patch | those changes, only when there are any |
| packages.txt | every installed package with its version |
| command.txt | the command, for a shell |
| environment.json | host, working folder and the variables of `RECORDED` |
| job.sbatch | the batch script, when Slurm runs the job |

No secret may get into these files: a variable's value is recorded only when its name stands in a list of such that hold
none, in the batch script too; others of the same families are named without their values.
"""

import datetime
import importlib.metadata
import logging
import os
import platform
import re
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from megatron_l0moe.chain.slurm.sbatch import SETUP_BEGINS, SETUP_ENDS
from megatron_l0moe.runs import stage_folder as source_tree
from megatron_l0moe.runs.stage_folder import versions, write_json, write_text
from megatron_l0moe.runs.stages import Run, config_hash

logger = logging.getLogger(__name__)

RECORDS = "records"
SBATCH_VARIABLE = "L0MOE_SBATCH_FILE"
"""Names the batch script of the job; set by the script itself."""
FAMILIES = (
    *("SLURM_", "NCCL_", "GLOO_", "UCX_", "FI_", "CUDA_", "NVIDIA_", "NVTE_"),
    *("TORCH_", "PYTORCH_", "TORCHELASTIC_", "OMP_", "KMP_", "GOMP_", "MKL_", "L0MOE_"),
)
"""Beginnings of names that are noted under `left_out` where their values are not recorded."""
RECORDED = frozenset(
    {
        *("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_JOB_QOS", "SLURM_JOB_NODELIST"),
        *("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME"),
        *("SLURM_JOB_NUM_NODES", "SLURM_NNODES", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NODEID"),
        *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "SLURM_JOB_GPUS"),
        *(
            "SLURM_GPUS",
            "SLURM_GPUS_ON_NODE",
            "SLURM_GPUS_PER_NODE",
            "SLURM_MEM_PER_NODE",
            "SLURM_MEM_PER_CPU",
        ),
        *("NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "NCCL_ALGO", "NCCL_PROTO", "NCCL_IB_HCA", "NCCL_IB_DISABLE"),
        *(
            "NCCL_IB_GID_INDEX",
            "NCCL_IB_TIMEOUT",
            "NCCL_IB_RETRY_CNT",
            "NCCL_IB_QPS_PER_CONNECTION",
            "NCCL_IB_TC",
        ),
        *(
            "NCCL_IB_SL",
            "NCCL_SOCKET_IFNAME",
            "NCCL_NET",
            "NCCL_NET_GDR_LEVEL",
            "NCCL_CROSS_NIC",
            "NCCL_NVLS_ENABLE",
        ),
        *("NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL", "NCCL_SHM_DISABLE", "NCCL_BUFFSIZE", "NCCL_NTHREADS"),
        *(
            "NCCL_MIN_NCHANNELS",
            "NCCL_MAX_NCHANNELS",
            "NCCL_CUMEM_ENABLE",
            "NCCL_TIMEOUT",
            "NCCL_BLOCKING_WAIT",
        ),
        *("GLOO_SOCKET_IFNAME", "UCX_TLS", "UCX_NET_DEVICES", "FI_PROVIDER", "FI_EFA_USE_DEVICE_RDMA"),
        *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING"),
        *("CUDA_MODULE_LOADING", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_TF32_OVERRIDE"),
        *("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN", "NVTE_ALLOW_NONDETERMINISTIC_ALGO"),
        *("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_BLOCKING_WAIT", "TORCH_NCCL_AVOID_RECORD_STREAMS"),
        *("TORCH_NCCL_HIGH_PRIORITY", "TORCH_DISTRIBUTED_DEBUG", "TORCH_CUDA_ARCH_LIST"),
        *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_NVML_BASED_CUDA_CHECK"),
        *("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "OMP_DYNAMIC", "KMP_AFFINITY", "KMP_BLOCKTIME"),
        *("GOMP_CPU_AFFINITY", "MKL_NUM_THREADS", "MKL_CBWR", "MKL_DYNAMIC"),
        *("L0MOE_LOG_DIR", "L0MOE_SBATCH_FILE"),
    }
)
"""Variables whose values are recorded."""
DIFF_LIMIT = 2**20
"""Bytes of diff.patch."""
_WORD = r"(?:'[^']*'|\"[^\"]*\"|\\.|[^\s,;&|'\"]|,(?![A-Za-z_]\w*=))*"
_EXPORTING = re.compile(r"(?m)^.*(?:\bexport\b|--export\b|\bdeclare\b|\benv\b|^\s*[A-Z_][A-Z0-9_]*=).*$")
"""Lines that set variables of the environment, in any case of letters."""
_ASSIGNMENT = re.compile(rf"(?<![\w$-])([A-Za-z_]\w*)=({_WORD})")
_OWN_LINES = re.compile(rf"(?ms)^{re.escape(SETUP_BEGINS)}\n(.*?)^{re.escape(SETUP_ENDS)}$")
_KEPT_LINE = re.compile(r"(?:export [A-Za-z_]\w*=|module load ).*")
_UNKNOWN_COMMIT = "unknown: the package was installed without its source tree, or git cannot be run here"


def write_records(run: Run, stage_folder: Path, command: Sequence[str], *, attempt: int) -> Path:
    """Write what this start of a training job consists of; returns the folder.

    Args:
        run: gives the recipe.
        stage_folder: of the stage, or of one expert.
        command: word by word, with `env NAME=VALUE ...` before it where the job has variables of its own.
        attempt: number of this start, from 1; a second call with the same number writes the files anew.
    """
    folder = stage_folder / RECORDS / f"attempt_{attempt:03d}"
    name = "experts" if stage_folder.name.isdigit() else stage_folder.name
    recipe = yaml.safe_dump(run.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_text(folder / "recipe.yaml", recipe)
    write_text(folder / "config_hash", config_hash(name, run.recipe) + "\n")
    write_text(folder / "commit", (source_tree.commit() or _UNKNOWN_COMMIT) + "\n")
    _write_changes(folder / "diff.patch", source_tree.changes(), source_tree.untracked())
    write_text(folder / "packages.txt", _packages())
    write_text(folder / "command.txt", shlex.join(command) + "\n")
    write_json(folder / "environment.json", _environment(os.environ))
    _copy_batch_script(os.environ.get(SBATCH_VARIABLE), folder / "job.sbatch")
    return folder


def next_attempt(stage_folder: Path) -> int:
    """Return the number after that of the last recorded start, 1 for the first."""
    numbers = [path.name.removeprefix("attempt_") for path in (stage_folder / RECORDS).glob("attempt_*")]
    return max((int(number) for number in numbers if number.isdigit()), default=0) + 1


def _write_changes(path: Path, changes: bytes, untracked: Sequence[str]) -> None:
    """Write the changes, cut at a whole line; files that git does not know are named, not copied."""
    notes = [f"# not in git, and not in this file: {name}" for name in untracked]
    if len(changes) > DIFF_LIMIT:
        notes.insert(0, f"# cut: {len(changes)} bytes of changes, of which the first {DIFF_LIMIT} are kept")
        changes = changes[: changes.rfind(b"\n", 0, DIFF_LIMIT) + 1]
    path.unlink(missing_ok=True)
    if changes or notes:
        path.write_bytes("".join(f"{note}\n" for note in notes).encode() + changes)


def _packages() -> str:
    found = {
        (distribution.metadata["Name"] or "?", distribution.version)
        for distribution in importlib.metadata.distributions()
    }
    lines = [f"{name}=={version}" for name, version in sorted(found, key=lambda pair: pair[0].lower())]
    return "\n".join([f"# Python {versions()['python']}", *lines]) + "\n"


def _environment(variables: Mapping[str, str]) -> dict[str, object]:
    kept = {name: value for name, value in variables.items() if name in RECORDED}
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": sys.executable,
        "working_folder": str(Path.cwd()),
        "variables": dict(sorted(kept.items())),
        "left_out": sorted(name for name in variables.keys() - kept.keys() if name.startswith(FAMILIES)),
    }


def _copy_batch_script(source: str | None, target: Path) -> None:
    if not source:
        return
    try:
        text = Path(source).read_text(encoding="utf-8", errors="replace")
    except OSError as error:  # a record that is missing must not cost the job its place in the queue
        logger.warning("The batch script %s cannot be recorded (%s).", source, error)
        text = f"# {source} could not be read: {error}\n"
    write_text(target, without_secrets(text))


def without_secrets(script: str) -> str:
    """Return a batch script without the values of variables that are not in `RECORDED`, and without set-up lines.

    Those of the cluster file may hold anything; they stand in the script that was submitted.
    """
    script = _OWN_LINES.sub(lambda found: found[0].replace(found[1], _known_lines(found[1]), 1), script)
    return _EXPORTING.sub(lambda line: _ASSIGNMENT.sub(_masked, line[0]), script)


def _known_lines(lines: str) -> str:
    kept = (
        line if _KEPT_LINE.fullmatch(line) else "# not recorded: a line of the cluster file"
        for line in lines.splitlines()
    )
    return "".join(f"{line}\n" for line in kept)


def _masked(assignment: re.Match[str]) -> str:
    return assignment[0] if assignment[1] in RECORDED else f"{assignment[1]}=***"

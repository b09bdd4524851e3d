"""What our processes take from the environment of whoever calls them, in one place.

They take it as it is, with these exceptions:

| variables | what becomes of them |
|---|---|
| `OUTER_JOB`: of a torchrun, an mpirun or a pod around us | left out: our one-process programs would wait for others |
| `OTHER_NUMBERS`: how exactly a library multiplies | left out: a run would differ from what its record says |
| `SLURM_...`, of a job that we run in | left out where a new job is submitted, but for `SLURM_CLIENT` |
| `SBATCH_...`, which win over a batch script's lines | left out where a job is submitted, but for defaults, see there |

`OMP_NUM_THREADS` and `CUDA_DEVICE_MAX_CONNECTIONS` of training are set by `chain/training_commands.py`. All others are
the user's: `CUDA_VISIBLE_DEVICES`, `HF_...`, `TRANSFORMERS_OFFLINE`, `NCCL_...`, `KMP_...`, `GOMP_...`, `PYTHONPATH`.
"""

import re
from collections.abc import Mapping, MutableMapping

VERBOSE = "L0MOE_VERBOSE"
"""Variable that is 1 where other libraries' warnings are shown: with --verbose, and where the output is a log."""
OUTER_JOB = re.compile(
    r"(?:RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT|NODE_RANK|NNODES|NPROC_PER_NODE)"
    r"|(?:LOCAL|GROUP|ROLE|CROSS)_(?:RANK|WORLD_SIZE|NAME)"
    # PET_...: torchrun's own defaults
    r"|(?:TORCHELASTIC_|PET_|ACCELERATE_|OMPI_COMM_WORLD_|PMI_|PMIX_|MV2_COMM_WORLD_|MPI_LOCAL)\w*"
)
OTHER_NUMBERS = re.compile(
    r"NVIDIA_TF32_OVERRIDE|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE|(?:ONEDNN|DNNL)_DEFAULT_FPMATH_MODE"
)
SLURM_CLIENT = frozenset({"SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS"})
"""Which cluster Slurm's commands talk to."""
SBATCH_DEFAULTS = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_WCKEY": "wckey",
}
"""Variables that sites and users set as their default, which hold where a script does not say it."""
SLURM_PREFIXES = ("SLURM_", "SBATCH_", "SQUEUE_", "SCANCEL_", "SACCT_", "SCONTROL_", "L0MOE_LOCK_FDS")
"""How variables begin that belong to the job that we run in, or would change the answers of Slurm's commands; and the
descriptors of locks, which cannot be handed on."""
_OPTION = re.compile(r"^#SBATCH --([a-z-]+)", re.M)


def for_our_processes(variables: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for a process of ours: no job around it, and numbers as the recipe says."""
    return {
        name: value
        for name, value in variables.items()
        if not (OUTER_JOB.fullmatch(name) or OTHER_NUMBERS.fullmatch(name))
    }


def for_slurm(variables: Mapping[str, str], script: str = "") -> dict[str, str]:
    """Return an environment for Slurm's commands; sbatch hands it on to the job.

    Args:
        script: the batch script that is submitted; what it says goes before the variables of sbatch.
    """
    said = set(_OPTION.findall(script))

    def is_kept(name: str) -> bool:
        if name in SBATCH_DEFAULTS:
            return SBATCH_DEFAULTS[name] not in said
        return name in SLURM_CLIENT or not name.startswith(SLURM_PREFIXES)

    return {name: value for name, value in for_our_processes(variables).items() if is_kept(name)}


def for_one_process() -> dict[str, str]:
    """Return the variables of a program that is one process of torch.distributed, whatever it was started from."""
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    return address | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


def replace(variables: MutableMapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Make an environment the wanted one, in place; returns the names of what is gone."""
    gone = sorted(set(variables) - set(wanted))
    for name in gone:
        del variables[name]
    variables.update(wanted)
    return gone

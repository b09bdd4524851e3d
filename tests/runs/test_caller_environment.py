"""What a caller's environment may not do to our processes."""

from megatron_l0moe.runs import caller_environment as caller

KEPT = {
    "PATH": "/bin",
    "CUDA_VISIBLE_DEVICES": "1",
    "OMP_NUM_THREADS": "3",
    "HF_HUB_OFFLINE": "1",
    "NCCL_DEBUG": "INFO",
    "KMP_BLOCKTIME": "0",
    "PYTHONPATH": "x",
    "RANKING": "1",
    "MY_WORLD_SIZE": "2",
}
OUTER = (
    *(
        "RANK",
        "LOCAL_RANK",
        "GROUP_RANK",
        "ROLE_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ),
    *(
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_ERROR_FILE",
        "PET_NNODES",
        "PET_RDZV_BACKEND",
        "OMPI_COMM_WORLD_SIZE",
    ),
    *("PMI_RANK", "PMIX_RANK", "ACCELERATE_MIXED_PRECISION"),
)
NUMBERS = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE")
SCRIPT = "#!/bin/bash\n#SBATCH --account=b\n#SBATCH --time=1:00\n#SBATCH --qos='x y'\n# --partition=none\n"


def test_no_job_around_our_processes() -> None:
    assert caller.for_our_processes(KEPT | dict.fromkeys((*OUTER, *NUMBERS), "1")) == KEPT
    job = {"SLURM_JOB_ID": "3", "L0MOE_LOG_DIR": "x"}
    assert caller.for_our_processes(KEPT | job) == KEPT | job


def test_one_process_is_one_process() -> None:
    assert {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items() <= caller.for_one_process().items()
    assert set(caller.for_one_process()) <= set(OUTER)


def test_slurm_gets_its_own_settings_and_no_job() -> None:
    client = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_JWT": "x", "SLURM_CLUSTERS": "a"}
    outer = dict.fromkeys(
        ("SLURM_JOB_ID", "SLURM_MEM_PER_CPU", "L0MOE_LOCK_FDS", "RANK", "SQUEUE_STATES"), "1"
    )
    assert caller.for_slurm(KEPT | client | outer) == KEPT | client


def test_scripts_go_before_the_variables_of_sbatch() -> None:
    """What the script does not say is left to the user's defaults of account, partition and QOS, and only of these."""
    never = dict.fromkeys(
        ("SBATCH_TIMELIMIT", "SBATCH_NO_REQUEUE", "SBATCH_WAIT", "SBATCH_EXPORT", "SBATCH_NEW"), "1"
    )
    defaults = dict.fromkeys(("SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_QOS"), "a")
    assert caller.for_slurm(KEPT | never | defaults) == KEPT | defaults
    assert caller.for_slurm(KEPT | never | defaults, SCRIPT) == KEPT | {"SBATCH_PARTITION": "a"}


def test_replacing_in_place() -> None:
    variables = {"A": "1", "B": "2"}
    assert caller.replace(variables, {"B": "3", "C": "4"}) == ["A"]
    assert variables == {"B": "3", "C": "4"}

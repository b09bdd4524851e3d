"""The settings file of one Slurm cluster: what its nodes have, what sbatch is told there, how Python starts.

Nothing in it changes a result; recipes stay the same on every cluster. Examples: slurm/clusters/. How many nodes, GPUs,
CPUs and how much memory the job of each stage takes, and whether the cluster has them, is computed here too.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from megatron_l0moe.errors import L0MoEError
from megatron_l0moe.recipe.recipe import Recipe
from megatron_l0moe.recipe.yaml_file import Settings, check_option_name, load_settings
from megatron_l0moe.runs.stages import CHAIN, TRAINING, spec_of

OptionValue = bool | int | str
OWN_OPTIONS = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "reservation": "reservation",
    "exclusive": "exclusive",
    "time": "stages.STAGE.time",
    "cpus-per-task": "cpus_per_node or stages.STAGE.cpus",
    "mem": "memory_per_node or stages.STAGE.memory",
    "gres": "gpus_per_node and gres, or stages.STAGE.gpus",
    "gpus-per-node": "gpus_per_node and gres, or stages.STAGE.gpus",
    "signal": "signal_lead_seconds",
    "mpi": "mpi",
    "array": "experts_at_once",
    "container-image": "container.image",
    "container-mounts": "container.mounts",
    **dict.fromkeys(("nodes", "ntasks", "ntasks-per-node"), "the recipe's parallel sections"),
    **dict.fromkeys(
        ("job-name", "output", "error", "open-mode", "requeue", "no-requeue", "dependency", "chdir"), ""
    ),
}
"""sbatch options that have a key of their own, or that the scripts depend on (no key)."""
WHOLE_OPTIONS = frozenset({"gpus"})
"""Options that begin like one of these and are others."""
MOST_OF_A_NODE = 2**16
"""CPUs or GPUs."""
RESTARTED = tuple(spec.name for spec in CHAIN if spec.restart != "clear")
"""Stages that go on from what an interrupted job left, which the signal before the time limit makes room for."""
_TIME = re.compile(r"[0-9]{1,6}-[0-9]{1,2}(?::[0-9]{2}){0,2}|[0-9]{1,8}(?::[0-9]{2}){0,2}")
_MEMORY = re.compile(r"[0-9]{1,12}[KMGT]?")


def time_seconds(text: str) -> int:
    """Return the seconds of a time as Slurm writes it: MIN, MIN:SEC, H:MIN:SEC, D-H, D-H:MIN, D-H:MIN:SEC.

    Raises:
        ValueError: it is none of these.
    """
    if not _TIME.fullmatch(text):
        raise ValueError('a time is written as "HOURS:MINUTES:SECONDS" or "DAYS-HOURS:MINUTES:SECONDS"')
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _check_time(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(
            'a time must be text; put it in quotes, "24:00:00"'
        )  # YAML counts 24:00:00 in base 60
    if isinstance(value, str):
        time_seconds(value)
    return value


def _check_memory(value: Any) -> Any:
    if value is not None and not (isinstance(value, str) and _MEMORY.fullmatch(value)):
        raise ValueError('memory must be text such as "480G" or "0" (all of the node)')
    return value


def _check_options(value: Any) -> Any:
    for name, setting in value.items() if isinstance(value, dict) else ():
        plain = str(name).lstrip("-")
        if plain != name or "_" in plain:
            raise ValueError(f"option {name!r} must be written as {plain.replace('_', '-')!r}")
        check_option_name(plain)
        if name in OWN_OPTIONS:
            key = OWN_OPTIONS[name]
            raise ValueError(
                f"option {name!r} " + (f"has a key of its own: {key}" if key else "is set by l0moe")
            )
        whole = next((option for option in OWN_OPTIONS if option.startswith(plain)), None)
        if whole is not None and plain not in WHOLE_OPTIONS:
            raise ValueError(
                f"option {name!r} would be taken for a short form of {whole!r}, which is set by l0moe"
            )
        if setting is False:
            raise ValueError(f"option {name!r} is false, which sbatch cannot be told; remove it")
    return value


def _check_environment(value: Any) -> Any:
    for name, setting in value.items() if isinstance(value, dict) else ():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(name)):
            raise ValueError(f"{name!r} is no name of an environment variable")
        if not isinstance(setting, str):
            raise ValueError(f'the value of {name} must be text; put it in quotes, "{setting}"')
    return value


SlurmTime = Annotated[str, BeforeValidator(_check_time)]
Memory = Annotated[str, BeforeValidator(_check_memory)]
Options = Annotated[dict[str, OptionValue], BeforeValidator(_check_options)]
Environment = Annotated[dict[str, str], BeforeValidator(_check_environment)]


class ContainerSection(Settings):
    """A container for every step, started by Slurm's pyxis plugin with enroot."""

    image: str = Field(min_length=1)
    """What pyxis takes: a .sqsh file, or registry#name:tag."""
    mounts: list[str] = Field(default_factory=list)
    """SOURCE:TARGET pairs; the folder that `l0moe` is started in is always mounted in its own place."""
    options: Options = Field(default_factory=dict)
    """Further options of pyxis by their long names, such as container-writable: true."""


class StageJob(Settings):
    """What the jobs of one stage ask for; None: what the cluster says, or what the recipe needs."""

    time: SlurmTime = "24:00:00"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus: int | None = Field(default=None, ge=0, le=MOST_OF_A_NODE)
    """Only of a stage that does not train; None: 1 for curate and evaluate, 0 for the others."""
    cpus: int | None = Field(default=None, ge=1, le=MOST_OF_A_NODE)
    """Only of a stage that does not train; None: the share of a node that goes with its GPUs, or 8."""
    memory: Memory | None = None
    """What a job takes of each node."""
    sbatch: Options = Field(default_factory=dict)
    """Further options for sbatch by their long names; they win over those of the cluster."""


class StageJobs(Settings):
    """One section for each stage."""

    convert: StageJob = StageJob(time="04:00:00")
    curate: StageJob = StageJob()
    experts: StageJob = StageJob()
    assemble: StageJob = StageJob(time="04:00:00")
    moe: StageJob = StageJob()
    export: StageJob = StageJob(time="04:00:00")
    evaluate: StageJob = StageJob(time="12:00:00")
    report: StageJob = StageJob(time="01:00:00")


class Cluster(Settings):
    """One cluster."""

    shell_lines = frozenset({"setup"})

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclusive: bool = False
    """Ask for whole nodes for training jobs that take all GPUs of a node."""
    gpus_per_node: int = Field(ge=0, le=MOST_OF_A_NODE)
    """0: a cluster without GPUs, where a training process takes `parallel.threads` CPUs."""
    gpu: Literal["h100", "h200", "a100"] | None = None
    """Its kind, to check memory before anything is queued; None: memory is not checked."""
    gres: str = "gpu"
    """How --gres calls a GPU, such as gpu:h100."""
    cpus_per_node: int = Field(ge=1, le=MOST_OF_A_NODE)
    memory_per_node: Memory | None = None
    """One node's memory; a job gets the share that goes with its GPUs or CPUs. "0": always all. None: not asked for."""
    experts_at_once: int | None = Field(default=None, ge=1, le=2**16)
    """Expert jobs that run at the same time; None: as many as the recipe's `gpus` hold, or 8 where it says none."""
    signal_lead_seconds: int = Field(default=300, ge=10, le=65535)
    """How long before the time limit a training job is told to save; Slurm may be up to 60 s early."""
    max_requeues: int = Field(default=50, ge=0, le=2**16)
    """A job that ended without a verdict, such as a step that could not start, is not queued again after so many."""
    file_wait_seconds: int = Field(default=60, ge=0, le=2**20)
    """How long a job waits for files that a shared file system shows late."""
    mpi: str = "none"
    """srun's --mpi; torchrun needs none."""
    master_port: int = Field(default=29500, ge=1024, le=64000)
    """First of 1000 ports; a job takes the one that its number falls on, so that jobs may share a node."""
    modules: list[str] = Field(default_factory=list)
    """Names for `module load`."""
    setup: list[str] = Field(default_factory=list)
    """Shell lines that prepare a job, such as the activation of an environment."""
    environment: Environment = Field(default_factory=dict)
    """Variables of every job, such as NCCL_*."""
    python: str | None = None
    """The interpreter on the nodes; None: the one that runs `l0moe`, or `python` in a container."""
    container: ContainerSection | None = None
    sbatch: Options = Field(default_factory=dict)
    """Further options for sbatch by their long names, such as mail-type: FAIL."""
    stages: StageJobs = StageJobs()

    @model_validator(mode="after")
    def _check(self) -> "Cluster":
        for name in RESTARTED:
            limit = time_seconds(getattr(self.stages, name).time)
            if limit < self.signal_lead_seconds + 60:
                raise ValueError(
                    f"stages.{name}.time must be at least a minute longer than signal_lead_seconds "
                    f"({self.signal_lead_seconds}); raise the one or lower the other"
                )
        for name in TRAINING:
            for key in ("gpus", "cpus"):
                if getattr(getattr(self.stages, name), key) is not None:
                    raise ValueError(
                        f"stages.{name}.{key} follows from the recipe's layout; remove it, and see "
                        "parallel.processes, nodes and threads there"
                    )
        for name in StageJobs.model_fields:
            wanted = getattr(self.stages, name).gpus or 0
            if wanted > self.gpus_per_node:
                raise ValueError(
                    f"stages.{name}.gpus ({wanted}) must be at most gpus_per_node ({self.gpus_per_node})"
                )
        return self

    def stage(self, name: str) -> StageJob:
        """Return the section of a stage."""
        section: StageJob = getattr(self.stages, name)
        return section


def load_cluster(path: str | Path) -> Cluster:
    """Read and validate a cluster file.

    Raises:
        L0MoEError: the file is missing, is not YAML, or breaks a rule; the message names the key.
    """
    return load_settings(path, Cluster, what="Cluster file", examples="slurm/clusters/")


"""Stages that train, and where the recipe has their layout."""
DEFAULT_CPUS = 8
"""The CPUs of a stage without GPUs."""
DEFAULT_AT_ONCE = 8
"""Expert jobs, where neither the cluster nor the recipe says how many."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one job of a stage asks for."""

    nodes: int
    gpus: int
    """What a job takes of each node."""
    cpus: int
    """What a job takes of each node."""
    memory: str | None
    """The memory of each node, as sbatch's --mem takes it; None: not asked for."""
    processes: int
    """Training processes on each node; 1 for other stages."""
    time: str
    exclusive: bool

    @property
    def all_gpus(self) -> int:
        """GPUs of the whole job."""
        return self.nodes * self.gpus


def resources(name: str, recipe: Recipe, cluster: Cluster) -> Resources:
    """Return what a job of a stage takes."""
    found = _of_training(name, recipe, cluster) if name in TRAINING else _of_other(name, recipe, cluster)
    if found.cpus > cluster.cpus_per_node:
        raise L0MoEError(
            f"Stage {name} needs {found.cpus} CPUs of a node, and cpus_per_node is {cluster.cpus_per_node}; lower "
            + (
                f"{TRAINING[name]}.parallel.threads, or take more nodes."
                if name in TRAINING
                else "stages.cpus."
            )
        )
    return found


def experts_at_once(recipe: Recipe, cluster: Cluster) -> int:
    """Return how many expert jobs may run at the same time."""
    if cluster.experts_at_once is not None:
        return cluster.experts_at_once
    if recipe.gpus is None:
        return DEFAULT_AT_ONCE
    jobs = recipe.gpus // recipe.expert_training.parallel.processes
    return min(max(jobs, 1), recipe.model.num_experts)


def _of_training(name: str, recipe: Recipe, cluster: Cluster) -> Resources:
    section = TRAINING[name]
    parallel = recipe.parallel(section)
    each = parallel.processes // parallel.nodes
    gpus = each if cluster.gpus_per_node else 0
    if gpus > cluster.gpus_per_node:
        raise L0MoEError(
            f"{section}.parallel puts {parallel.processes} processes on {parallel.nodes} node(s), {each} on each, and "
            f"gpus_per_node is {cluster.gpus_per_node}; set {section}.parallel.nodes to "
            f"{_nodes_for(parallel.processes, cluster.gpus_per_node)}."
        )
    cpus = _share_of_cpus(gpus, cluster) if gpus else each * parallel.threads
    return Resources(
        nodes=parallel.nodes,
        gpus=gpus,
        cpus=cpus,
        memory=cluster.stage(name).memory or _share_of_memory(gpus, cpus, cluster),
        processes=each,
        time=cluster.stage(name).time,
        exclusive=cluster.exclusive and gpus == cluster.gpus_per_node,
    )


def _of_other(name: str, recipe: Recipe, cluster: Cluster) -> Resources:
    stage, wants_gpu = cluster.stage(name), spec_of(name, recipe.method).wants_gpu
    gpus, cpus = stage.gpus, stage.cpus
    if (
        name == "curate" and recipe.data.executor.kind == "slurm"
    ):  # a driver, which only waits for its own arrays
        gpus, cpus = gpus or 0, cpus or 1
    if gpus is None:
        gpus = min(1, cluster.gpus_per_node) if wants_gpu else 0
    if cpus is None:
        cpus = _share_of_cpus(gpus, cluster) if gpus else min(DEFAULT_CPUS, cluster.cpus_per_node)
    return Resources(
        nodes=1,
        gpus=gpus,
        cpus=cpus,
        memory=stage.memory or _share_of_memory(gpus, cpus, cluster),
        processes=1,
        time=stage.time,
        exclusive=False,
    )


def _nodes_for(processes: int, gpus_per_node: int) -> int:
    """Return the fewest nodes that hold the processes, the same number on each."""
    return next(n for n in range(1, processes + 1) if processes % n == 0 and processes // n <= gpus_per_node)


def _share_of_cpus(gpus: int, cluster: Cluster) -> int:
    return max(1, cluster.cpus_per_node * gpus // cluster.gpus_per_node)


def _share_of_memory(gpus: int, cpus: int, cluster: Cluster) -> str | None:
    """Return the part of a node's memory that goes with a job's GPUs, or with its CPUs where it has none."""
    memory = cluster.memory_per_node
    if memory in (None, "0"):
        return memory
    parts = re.fullmatch(r"(\d+)([KMGT]?)", memory or "")
    assert parts, "the cluster file was checked"
    whole = gpus == cluster.gpus_per_node if gpus else cpus == cluster.cpus_per_node
    if whole:
        return memory
    mebibytes = int(parts[1]) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}[parts[2]]
    share = gpus / cluster.gpus_per_node if gpus else cpus / cluster.cpus_per_node
    return f"{max(1, int(mebibytes * share))}M"

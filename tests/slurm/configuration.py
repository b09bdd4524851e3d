"""The files that a test cluster is made of: slurm.conf, the nodes' start, /etc/hosts, who may submit."""

from pathlib import Path

from slurm.packages import Programs

CONTROLLER, CONTROLLER_ADDRESS = "head", "10.77.0.1"
BRIDGE = "br0"
CPUS, MEMORY_MB = 16, 64_000
"""What a node says it has; nobody checks it against the real machine."""
GPU_FILES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")
"""Slurm wants a device for each GPU that it hands out, and opens none."""
REFUSED_ACCOUNT = "bankrupt"


def node_address(number: int) -> str:
    """Return the address of node 1, 2, ..."""
    return f"10.77.0.{10 + number}"


def slurm_conf(folder: Path, programs: Programs, nodes: list[str]) -> str:
    """Return slurm.conf: real scheduling, requeueing and preemption, with short times."""
    lines = [
        "ClusterName=test",
        f"SlurmctldHost={CONTROLLER}({CONTROLLER_ADDRESS})",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        # A requeued job waits until its old credential has expired. 5 seconds is the least that is accepted.
        f"AuthInfo=socket={folder}/munge/socket,cred_expire=5",
        "CredType=cred/munge",
        f"PluginDir={programs.plugins}",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool/%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd.%n.pid",
        f"SlurmctldLogFile={folder}/log/slurmctld.log",
        f"SlurmdLogFile={folder}/log/slurmd.%n.log",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "AccountingStorageType=accounting_storage/none",
        "JobCompType=jobcomp/none",
        "JobSubmitPlugins=lua",
        "MpiDefault=none",
        "SwitchType=switch/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU_Memory",
        "DefMemPerCPU=1000",  # otherwise a job that names no memory takes all of a node's
        "GresTypes=gpu",
        "SlurmdParameters=config_overrides",
        "ReturnToService=2",  # a node that answers again is used again
        "JobRequeue=1",
        "EnforcePartLimits=ALL",
        "SlurmdTimeout=10",  # until a silent node is down
        "SlurmctldTimeout=10",
        "MessageTimeout=10",
        "KillWait=5",
        "UnkillableStepTimeout=20",
        "CompleteWait=0",
        "InactiveLimit=0",
        "MinJobAge=3600",
        "MaxArraySize=1001",
        "SchedulerType=sched/backfill",
        "SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "SlurmctldParameters=preempt_send_user_signal",
    ]
    for number, name in enumerate(nodes, start=1):
        lines.append(
            f"NodeName={name} NodeAddr={node_address(number)} CPUs={CPUS} RealMemory={MEMORY_MB} "
            f"Gres=gpu:{len(GPU_FILES)} State=UNKNOWN"
        )
    lines += [
        "PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30",
        "PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF",
    ]
    return "\n".join(lines) + "\n"


def gres_conf() -> str:
    """Return gres.conf: the same GPUs on all nodes."""
    return "AutoDetect=off\n" + "".join(f"Name=gpu File={file}\n" for file in GPU_FILES)


def hosts(nodes: list[str]) -> str:
    """Return /etc/hosts as all machines of the cluster see it."""
    addresses = [("127.0.0.1", "localhost"), (CONTROLLER_ADDRESS, CONTROLLER)]
    addresses += [(node_address(number), name) for number, name in enumerate(nodes, start=1)]
    return "".join(f"{address} {name}\n" for address, name in addresses)


def controller_script(folder: Path) -> str:
    """Return process 1 of the head machine, in which the nodes are: it ends when its standard input does."""
    return f"""\
set -e
hostname {CONTROLLER}
mount --bind {folder}/hosts /etc/hosts
ip link set lo up
ip link add {BRIDGE} type bridge
ip addr add {CONTROLLER_ADDRESS}/24 dev {BRIDGE}
ip link set {BRIDGE} up
touch {folder}/booted
read -r || true
"""


def node_script(folder: Path, name: str, number: int) -> str:
    """Return process 1 of a node; it waits for its cable, then runs slurmd."""
    return f"""\
set -e
hostname {name}
mount --bind {folder}/hosts /etc/hosts
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip addr add {node_address(number)}/24 dev eth0
ip link set eth0 up
slurmd -D -f {folder}/slurm.conf -N {name} -d {folder}/bin/slurmstepd </dev/null &
wait $!
"""


def job_submit_lua() -> str:
    """Return the site's own check of jobs: without an accounting database it stands for a refused account."""
    return f"""\
function slurm_job_submit(job, partitions, user)
  if job.account == "{REFUSED_ACCOUNT}" then
    return slurm.ESLURM_INVALID_ACCOUNT
  end
  return slurm.SUCCESS
end
function slurm_job_modify(job, record, partitions, user)
  return slurm.SUCCESS
end
"""

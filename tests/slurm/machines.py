"""Virtual machines out of Linux namespaces: processes, network, mounts and host name of their own."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from slurm.packages import UnavailableError

KINDS = ("pid", "net", "mount", "uts", "ipc")


class Machine:
    """A process 1 with namespaces of its own; when it ends, the kernel ends every process inside."""

    def __init__(
        self, name: str, script: Path, log: Path, *, env: dict[str, str], host: "Machine | None" = None
    ) -> None:
        """Boot: run a bash script as process 1, inside of `host` if given.

        Its standard input is a pipe that closes when this Python process ends, however it ends: a script that
        reads it to its end does not outlive a killed test session.
        """
        self.name = name
        command = ["unshare", *(f"--{kind}" for kind in KINDS), "--fork", "--kill-child", "--mount-proc"]
        command += ["bash", str(script)]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                host.inside(command) if host else command,
                env=env,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = _descendant(self._process, generations=2 if host else 1)

    def inside(self, command: list[str], cwd: Path | None = None) -> list[str]:
        """Return the command that runs `command` in this machine."""
        place = [f"--wd={cwd}"] if cwd else []
        return ["nsenter", f"--target={self.pid}", *(f"--{kind}" for kind in KINDS), *place, "--", *command]

    def processes(self) -> Iterator[psutil.Process]:
        """Yield the processes that run directly in this machine."""
        own = _process_namespace(self.pid)
        for process in psutil.process_iter():
            if own and _process_namespace(process.pid) == own:
                yield process

    @property
    def running(self) -> bool:
        """Whether process 1 lives."""
        return self._process.poll() is None

    def crash(self) -> None:
        """Kill process 1 and wait until the kernel has ended all others."""
        if self.running:
            os.kill(self.pid, signal.SIGKILL)
        self._process.wait(timeout=30)
        if self._process.stdin:
            self._process.stdin.close()


def connect(host: Machine, guest: Machine, bridge: str) -> None:
    """Lay a cable from the guest's eth0 to a bridge of the host; the host's end is called `v-GUEST`."""
    cable = f"v-{guest.name}"
    link(host, "del", cable, check=False)  # of an earlier boot, if the kernel has not removed it yet
    link(host, "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(guest.pid))
    link(host, "set", cable, "master", bridge, "up")


def link(host: Machine, *words: str, check: bool = True) -> None:
    """Run `ip link` in the host's network; process numbers in it are those of the real machine."""
    subprocess.run(
        ["nsenter", f"--target={host.pid}", "--net", "--", "ip", "link", *words],
        check=check,
        capture_output=True,
    )


def check_namespaces() -> None:
    """Try what the cluster needs from the kernel.

    Raises:
        UnavailableError: not Linux, not root, or something is missing or forbidden.
    """
    if os.uname().sysname != "Linux":
        raise UnavailableError("the test cluster is made of Linux namespaces")
    if os.geteuid():
        raise UnavailableError("the test cluster needs root, to make namespaces")
    attempts = (
        "mount --bind /etc/hosts /etc/hosts",
        "ip link add br0 type bridge",
        "ip link add v0 type veth peer name v1",
    )
    command = ["unshare", *(f"--{kind}" for kind in KINDS), "--fork", "--mount-proc"]
    command += ["sh", "-c", " && ".join(attempts)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UnavailableError(f"the test cluster needs unshare of util-linux ({error})") from error
    if done.returncode:
        raise UnavailableError(f"no namespaces with a network of their own here ({done.stderr.strip()})")


def _descendant(process: "subprocess.Popen[bytes]", generations: int) -> int:
    """Return the pid of a process's only child, its only child and so on."""
    pid = process.pid
    for _ in range(generations):
        deadline = time.monotonic() + 30
        while not (children := psutil.Process(pid).children()):
            assert process.poll() is None, f"{process.args} ended with {process.returncode}"
            assert time.monotonic() < deadline, f"{process.args} started nothing"
            time.sleep(0.01)
        pid = children[0].pid
    return pid


def _process_namespace(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None

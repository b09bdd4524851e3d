"""A real Slurm of virtual nodes on this machine, and what can happen to one."""

import contextlib
import os
import re
import secrets
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from slurm.machines import Machine, connect, link
from slurm.packages import Programs

from slurm import configuration

START_SECONDS = 60.0
POLL_SECONDS = 0.2
UNFINISHED = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED"}


class Cluster:
    """Three nodes and a controller; all of it is gone after `close`, or when this Python process ends."""

    def __init__(self, folder: Path, programs: Programs, nodes: int = 3) -> None:
        """Write the cluster's files to `folder`, whose path has to be short for the socket in it."""
        self.folder = folder
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.machines: dict[str, Machine] = {}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._write_files(programs)

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Commands and jobs

    def run(
        self,
        *command: str | Path,
        cwd: Path | None = None,
        check: bool = True,
        timeout: float = 120,
        **env: str,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command on the head machine, Slurm's own or any other; `env` adds to this process's environment."""
        done = subprocess.run(
            self.head.inside([str(word) for word in command], cwd or Path.cwd()),
            env=self.environment() | env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        assert not (check and done.returncode), (
            f"{command} gave {done.returncode}: {done.stdout}{done.stderr}"
        )
        return done

    def environment(self) -> dict[str, str]:
        """Return this process's environment with Slurm's commands on the path."""
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def submit(self, *words: str | Path, script: str | None = None, **env: str) -> str:
        """Submit `script`, or what the words say, and return the job's number. It logs to FOLDER/jobs/ID.log."""
        logs = self.folder / "jobs"
        logs.mkdir(exist_ok=True)
        options: list[str | Path] = [
            "sbatch",
            "--parsable",
            f"--output={logs}/%A_%a.log",
            "--open-mode=append",
        ]
        if not any("array" in str(word) for word in words):
            options[2] = f"--output={logs}/%j.log"
        if script is not None:
            file = logs / f"{secrets.token_hex(4)}.sh"
            file.write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
            words = (*words, file)
        return self.run(*options, *words, **env).stdout.strip()

    def log(self, job: str) -> str:
        """Return what a job or array task (ID_INDEX) has written."""
        file = self.folder / "jobs" / f"{job}.log"
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""

    def jobs(self, job: str) -> list[dict[str, str]]:
        """Return what Slurm knows of a job, one record for each task of an array."""
        shown = self.run("scontrol", "show", "job", "--oneliner", job, check=False)
        return [
            dict(re.findall(r"(\w+)=(\S*)", line)) for line in shown.stdout.splitlines() if "JobId=" in line
        ]

    def job(self, job: str) -> dict[str, str]:
        """Return what Slurm knows of a job that is no array."""
        (record,) = self.jobs(job)
        return record

    def wait_for_job(self, job: str, *states: str, timeout: float = 60) -> list[dict[str, str]]:
        """Wait until all tasks of a job are in one of the states, or (none given) finished; return its records."""

        def reached() -> bool:
            found = {record["JobState"] for record in self.jobs(job)}
            return bool(found) and (found <= set(states) if states else not found & UNFINISHED)

        self.wait_until(reached, timeout, lambda: f"job {job}: {self.jobs(job)}\n{self.log(job)}")
        return self.jobs(job)

    def processes(self, *words: str, node: str | None = None) -> list[psutil.Process]:
        """Return the processes on the nodes, or on one, whose command line has all of these words in it."""
        found = []
        for machine in [self.machines[node]] if node else [self.machines[name] for name in self.nodes]:
            for process in machine.processes():
                with contextlib.suppress(psutil.Error):
                    line = " ".join(process.cmdline())
                    if all(word in line for word in words):
                        found.append(process)
        return found

    def wait_until(
        self,
        condition: Callable[[], bool],
        timeout: float,
        explain: Callable[[], str],
        *,
        every: float = POLL_SECONDS,
    ) -> None:
        """Wait until a condition holds; fails, with an explanation, if it does not in time or if the cluster ends."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.head.running, f"the cluster has ended: {self._logs()}"
            assert time.monotonic() < deadline, f"waited {timeout:g} s; {explain()}"
            time.sleep(every)

    # What can happen

    def crash_node(self, name: str) -> None:
        """Switch a node off: all of its processes are gone at once."""
        self.machines[name].crash()

    def start_node(self, name: str) -> None:
        """Switch a node on (again)."""
        script = self.folder / f"{name}.sh"
        node = Machine(
            name, script, self.folder / "log" / f"{name}.out", host=self.head, env=self.environment()
        )
        self.machines[name] = node
        connect(self.head, node, configuration.BRIDGE)

    def cut_network(self, name: str) -> None:
        """Pull a node's network cable; its processes go on."""
        link(self.head, "set", f"v-{name}", "down")

    def restore_network(self, name: str) -> None:
        """Plug the cable in again, and tell the controller so: by itself it asks a silent node once a minute."""
        link(self.head, "set", f"v-{name}", "up")
        self.run("scontrol", "update", f"nodename={name}", "state=resume", check=False)

    def node_state(self, name: str) -> str:
        """Return a node's state as sinfo names it, such as `idle`, `alloc` or `down*`."""
        return self.run(
            "sinfo", "--noheader", "--nodes", name, "--partition=batch", "--format=%t"
        ).stdout.strip()

    def wait_for_node(self, name: str, *states: str, timeout: float = 240) -> None:
        """Wait until a node is in one of the states."""
        self.wait_until(
            lambda: self.node_state(name) in states, timeout, lambda: f"{name}: {self.node_state(name)}"
        )

    def wait_for_saved_state(self) -> None:
        """Wait until the controller has written down what it knows now, which it does every few seconds."""
        file, now = self.folder / "state" / "job_state", time.time()
        self.wait_until(lambda: file.is_file() and file.stat().st_mtime > now, 30, self._logs)

    def kill_controller(self) -> None:
        """Kill slurmctld; what it has not saved is lost, such as that a job was started just before."""
        daemon = self._daemons.pop("slurmctld")
        for process in psutil.Process(daemon.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        daemon.wait(timeout=30)

    def start_controller(self, *words: str) -> None:
        """Start slurmctld, which reads what it knew before, and wait until it answers."""
        self._spawn("slurmctld", "-D", *words)
        self.wait_until(
            lambda: not self.run("scontrol", "ping", check=False).returncode, START_SECONDS, self._logs
        )

    @property
    def head(self) -> Machine:
        """The machine that the controller and the users' commands run on; the nodes are inside of it."""
        return self.machines[configuration.CONTROLLER]

    def close(self) -> None:
        """End everything."""
        if configuration.CONTROLLER in self.machines:
            self.head.crash()  # with it all that is inside
        for machine in self.machines.values():
            machine.crash()
        for daemon in self._daemons.values():
            daemon.wait(timeout=30)

    # Inner parts

    def _write_files(self, programs: Programs) -> None:
        for name in ("bin", "log", "munge", "spool", "state"):
            (self.folder / name).mkdir(parents=True)
        files = {
            "slurm.conf": configuration.slurm_conf(self.folder, programs, self.nodes),
            "gres.conf": configuration.gres_conf(),
            "job_submit.lua": configuration.job_submit_lua(),
            "hosts": configuration.hosts(self.nodes),
            "head.sh": configuration.controller_script(self.folder),
        }
        for number, name in enumerate(self.nodes, start=1):
            files[f"{name}.sh"] = configuration.node_script(self.folder, name, number)
        for file, text in files.items():
            (self.folder / file).write_text(text, encoding="utf-8")
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        programs.write_shims(self.folder / "bin", self.folder / "slurm.conf")

    def _start(self) -> None:
        log = self.folder / "log" / "head.out"
        head = Machine(configuration.CONTROLLER, self.folder / "head.sh", log, env=self.environment())
        self.machines[head.name] = head
        self.wait_until((self.folder / "booted").exists, START_SECONDS, self._logs)
        munge = self.folder / "munge"
        self._spawn(
            "munged", "--foreground", "--force", f"--socket={munge}/socket", f"--key-file={munge}/key",
            f"--log-file={munge}/log", f"--pid-file={munge}/pid", f"--seed-file={munge}/seed",
        )  # fmt: skip
        self.wait_until((munge / "socket").exists, START_SECONDS, self._logs)
        self.start_controller("-c")
        for name in self.nodes:
            self.start_node(name)
        for name in self.nodes:
            self.wait_for_node(name, "idle", timeout=START_SECONDS)

    def _spawn(self, name: str, *words: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                self.head.inside([str(self.folder / "bin" / name), *words], self.folder),
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _logs(self) -> str:
        """Return the last lines of the daemons' logs."""
        logs = sorted((self.folder / "log").iterdir())
        return "\n".join(f"{log.name}:\n" + "\n".join(log.read_text().splitlines()[-8:]) for log in logs)
